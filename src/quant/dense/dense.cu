// Steps of models that hold fp16 and fp32 alone.

#include "quant/step.cuh"

STEP_KERNEL(half, HalfDecoder, STAGES)
