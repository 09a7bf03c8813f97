//! Leases on the modelled kernel: whatever is killed, refused or done by a tenant, the function comes back as it was.

mod adapters;
mod busy;
mod choice;
mod crashes;
mod igb;
mod programs;
mod regressions;
mod source;
mod vfio;
mod world;
