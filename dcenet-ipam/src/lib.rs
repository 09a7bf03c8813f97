//! dcenet-ipam
