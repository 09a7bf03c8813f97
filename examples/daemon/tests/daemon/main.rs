//! The daemon as a service manager runs it: a process in a host of its own, with pods attached as the plugin does it.

mod bundles;
mod common;
mod fabric;
mod kubelet;
mod names;
mod operating;
mod owner;
mod reclaim;
mod thin;
mod trouble;
