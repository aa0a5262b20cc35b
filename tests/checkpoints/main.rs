//! Checkpoints that are not as config.json or their index has them. Right values are transformers 5.24's (fp16 weights, fp32
//! compute), of the same inputs.

mod folder;
mod foreign;
mod heads;
mod names;
mod quantized;
mod shards;
mod unread;
