//! How drivers differ.

/// What a port's driver does its own way. Sources are files below drivers/net/ethernet of Linux.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Profile {
    /// The port's driver.
    pub driver: &'static str,
    /// The driver of its functions.
    pub vf_driver: &'static str,
    /// How many functions a port can have.
    pub total_vfs: u16,
    /// Refuses 802.1ad.
    pub refuses_service_tags: bool,
    /// Has no rates.
    pub no_rate: bool,
    /// Refuses a guaranteed rate.
    pub refuses_min_rate: bool,
    /// Takes rates only while the port has carrier, no limit included.
    pub rate_needs_carrier: bool,
    /// Has no link state.
    pub no_link_state: bool,
    /// Has trust.
    pub has_trust: bool,
    /// Has the RSS query.
    pub has_rss_query: bool,
    /// Reports the spoof check.
    pub has_spoofchk: bool,
    /// Gives each function an administrator's address when it is made.
    pub has_mac_at_birth: bool,
    /// Refuses zeros as the administrator's address.
    pub refuses_zero_mac: bool,
    /// Reports the function's own address as the administrator's, once the function's driver has told it. The model has it
    /// tell when the function is set up, as igbvf does where its port was down when it was bound, and on Linux 6.1; else
    /// it does so when it is bound.
    pub reports_own_mac: bool,
    /// A function gets the administrator's address at once, and not when its driver is bound the next time.
    pub mac_reaches_device_at_once: bool,
    /// A function changes the address that its port gave it only while it is trusted; refused with this errno.
    pub mac_is_fixed: Option<i32>,
}

impl Profile {
    /// Intel 82576 (intel/igb, intel/igbvf). A test in the guest compares it with QEMU's.
    pub const IGB: Self = Self {
        driver: "igb",
        vf_driver: "igbvf",
        total_vfs: 7,
        refuses_service_tags: true,
        no_rate: false,
        refuses_min_rate: true,
        rate_needs_carrier: true,
        no_link_state: true,
        has_trust: true,
        has_rss_query: false,
        has_spoofchk: true,
        refuses_zero_mac: false,
        has_mac_at_birth: false,
        reports_own_mac: true,
        mac_reaches_device_at_once: false,
        mac_is_fixed: Some(libc::EADDRNOTAVAIL),
    };

    /// NVIDIA ConnectX (mellanox/mlx5/core).
    pub const MLX5: Self = Self {
        driver: "mlx5_core",
        vf_driver: "mlx5_core",
        total_vfs: 8,
        refuses_min_rate: false,
        rate_needs_carrier: false,
        no_link_state: false,
        reports_own_mac: false,
        mac_is_fixed: None,
        ..Self::IGB
    };

    /// Intel E810 (intel/ice, intel/iavf).
    pub const ICE: Self = Self {
        driver: "ice",
        vf_driver: "iavf",
        total_vfs: 128,
        refuses_service_tags: false,
        mac_reaches_device_at_once: true,
        mac_is_fixed: Some(libc::EACCES),
        ..Self::MLX5
    };

    /// Intel X710 (intel/i40e, intel/iavf).
    pub const I40E: Self =
        Self { driver: "i40e", total_vfs: 64, refuses_service_tags: true, refuses_min_rate: true, ..Self::ICE };

    /// Broadcom 57810 (broadcom/bnx2x), which wants an address where others take zeros (`bnx2x_set_vf_mac`).
    pub const BNX2X: Self = Self {
        driver: "bnx2x",
        vf_driver: "bnx2x",
        refuses_service_tags: true,
        no_rate: true,
        refuses_min_rate: true,
        has_trust: false,
        refuses_zero_mac: true,
        has_mac_at_birth: true,
        mac_is_fixed: Some(libc::EADDRNOTAVAIL),
        ..Self::MLX5
    };

    /// All of them.
    pub const ALL: [Self; 5] = [Self::IGB, Self::MLX5, Self::ICE, Self::I40E, Self::BNX2X];
}
