//! Virtual functions in trees of files and over a modelled kernel: no privileges, no adapters.

mod allocation;
mod inventory;
mod pools;
