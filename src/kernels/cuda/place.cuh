// Where the sequences of a batch stand. kernels/cuda/place.rs mirrors the struct.
#pragma once

struct Place {
    int position;  // that the next row of the sequence has
    int encoded;   // rows that the encoder has made of it
    int step;      // tokens that were chosen, the number of the last one
    int unused;
};
