//! dcenet-policy
