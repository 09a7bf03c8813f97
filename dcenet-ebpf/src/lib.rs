//! dcenet-ebpf
