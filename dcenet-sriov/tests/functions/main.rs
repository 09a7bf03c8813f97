//! Virtual functions in trees of files, without privileges or adapters; and in the guest, of igb.

mod allocation;
mod igb;
mod inventory;
mod modelled;
mod pools;
