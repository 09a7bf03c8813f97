//! Virtual functions in trees of files, without privileges or adapters; and in the guest, of igb
//! and netdevsim.

mod allocation;
mod counts;
mod igb;
mod inventory;
mod linux;
mod modelled;
mod netdevsim;
mod pools;
