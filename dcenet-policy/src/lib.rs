//! dcenet-policy

// A library neither prints nor panics on its caller's input.
#![warn(unreachable_pub, clippy::print_stderr, clippy::print_stdout, clippy::unwrap_used)]
