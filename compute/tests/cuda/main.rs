//! Every operator on the GPU, over shapes with 0, 1 and odd sizes, against the scalar reference (bits against the CPU's
//! where bits are specified), with fresh random data and poisoned outputs; and each row alone against its batch.
//!
//! Where there is no GPU a test says so and has checked nothing; what needs only the compiler runs where that is.
//! `compute/scripts/gpu_check.sh` runs these on a GPU machine and fails if anything was left out.

mod cache;
mod choice;
mod device;
mod experts;
mod fused;
mod products;
mod rows;
mod sample;
mod support;
