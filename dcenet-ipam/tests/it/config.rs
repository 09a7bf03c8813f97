//! What a configuration may say, and how it is told off.

use dcenet_ipam::IpamConfig;

use crate::config;

fn error(pools: &str) -> (String, String) {
    let error = config(&format!(r#"{{ "pools": [ {pools} ] }}"#)).layout().unwrap_err();
    (error.field.clone(), error.to_string())
}

#[test]
fn faults_name_field_value_and_remedy() {
    let cases = [
        (r#"{ "name": "a b", "subnet": "10.0.0.0/24" }"#, "ipam.pools[0].name", "\"a b\""),
        (r#"{ "name": "a", "space": "", "subnet": "10.0.0.0/24" }"#, "ipam.pools[0].space", "63 bytes"),
        (r#"{ "name": "a", "subnet": "10.0.0.7/24" }"#, "ipam.pools[0].subnet", "write 10.0.0.0/24"),
        (r#"{ "name": "a", "subnet": "::ffff:10.0.0.0/120" }"#, "ipam.pools[0].subnet", "write the IPv4 prefix"),
        (
            r#"{ "name": "a", "subnet": "10.0.0.0/24", "ranges": ["10.0.0.5", "10.0.0.9-10.0.1.3"] }"#,
            "ipam.pools[0].ranges[1]",
            "\"10.0.0.9-10.0.1.3\" is not in the pool's subnet 10.0.0.0/24",
        ),
        (
            r#"{ "name": "a", "subnet": "10.0.0.0/24", "ranges": ["10.0.0.9-10.0.0.3"] }"#,
            "ipam.pools[0].ranges[0]",
            "write the lower address first",
        ),
        (r#"{ "name": "a", "subnet": "10.0.0.0/24", "exclude": ["fd00::1"] }"#, "ipam.pools[0].exclude[0]", "fd00::1"),
        (r#"{ "name": "a", "subnet": "10.0.0.0/24", "gateway": "10.0.1.1" }"#, "ipam.pools[0].gateway", "10.0.1.1"),
        (
            r#"{ "name": "a", "subnet": "10.0.0.0/24", "ranges": ["10.0.0.1"], "gateway": "10.0.0.1" }"#,
            "ipam.pools[0].ranges",
            "no address to hand out",
        ),
        (
            r#"{ "name": "a", "subnet": "10.0.0.0/24" }, { "name": "b", "subnet": "10.0.0.128/25" }"#,
            "ipam.pools[1].subnet",
            "overlaps pool a (10.0.0.0/24) of space default",
        ),
        (
            r#"{ "name": "a", "subnet": "10.0.0.0/24" }, { "name": "a", "subnet": "10.1.0.0/24" }"#,
            "ipam.pools[1].name",
            "taken by the pool with subnet 10.0.0.0/24",
        ),
        (
            r#"{ "name": "a", "subnet": "10.0.0.0/24", "claims": { "shop/db": { "address": "10.9.0.1" } } }"#,
            "ipam.pools[0].claims[\"shop/db\"].address",
            "not in the pool's subnet",
        ),
        (
            r#"{ "name": "a", "subnet": "10.0.0.0/24", "claims": { "shop/db": { "address": "10.0.0.255" } } }"#,
            "ipam.pools[0].claims[\"shop/db\"].address",
            "the broadcast address",
        ),
        (
            r#"{ "name": "a", "subnet": "fd00::/64", "claims": { "shop/db": { "address": "fd00::" } } }"#,
            "ipam.pools[0].claims[\"shop/db\"].address",
            "the subnet-router anycast address",
        ),
        (
            r#"{ "name": "a", "subnet": "10.0.0.0/24", "claims": { "a/x": { "address": "10.0.0.3" },
                 "a/y": { "address": "10.0.0.3" } } }"#,
            "ipam.pools[0].claims[\"a/y\"].address",
            "taken by claim a/x",
        ),
        (
            r#"{ "name": "a", "subnet": "10.0.0.0/24", "claims": { "shop": {} } }"#,
            "ipam.pools[0].claims[\"shop\"]",
            "namespace/name",
        ),
        (
            r#"{ "name": "a", "subnet": "10.0.0.0/24", "claims": { "a/x": {} } },
               { "name": "b", "subnet": "10.1.0.0/24", "claims": { "a/x": {} } }"#,
            "ipam.pools[1].claims[\"a/x\"]",
            "pool a of the same family",
        ),
        ("", "ipam.pools", "name at least one pool"),
    ];
    for (pools, field, part) in cases {
        let (at, text) = error(pools);
        assert_eq!(at, field, "{text}");
        assert!(text.contains(part), "{text}\nlacks {part}");
    }
}

#[test]
fn unknown_keys_and_kinds_are_refused() {
    for bad in [
        r#"{ "pools": [], "pool": [] }"#,
        r#"{ "pools": [ { "name": "a", "subnet": "10.0.0.0/24", "range": [] } ] }"#,
        r#"{ "pools": [], "store": { "kind": "disc" } }"#,
        r#"{ "pools": [], "store": { "kind": "memory", "path": "/x" } }"#,
        r#"{ "pools": [], "cooldown": "5 minutes" }"#,
        r#"{ "pools": [ { "name": "a", "subnet": "10.0.0.0/24", "ranges": ["10.0.0.1-"] } ] }"#,
        r#"{ "pools": [ { "name": "a", "subnet": "10.0.0.0/24", "claims": { "a/b": { "keep": "always" } } } ] }"#,
    ] {
        serde_json::from_str::<IpamConfig>(bad).unwrap_err();
    }
    assert!(config(r#"{ "type": "host-local", "pools": [] }"#).layout().unwrap_err().to_string().contains("ipam.type"));
}

#[test]
fn a_configuration_reads_back_as_written() {
    let json = r#"{"type":"dcenet","store":{"kind":"log","path":"/x"},"pools":[{"name":"db","space":"blue",
        "subnet":"10.20.0.0/24","ranges":["10.20.0.10-10.20.0.99","10.20.0.128/26"],"exclude":["10.20.0.50"],
        "gateway":"10.20.0.1","claims":{"shop/db/net1":{"address":"10.20.0.11","keep":"forever"}}}],"cooldown":"90s"}"#;
    let read = config(json);
    let again: IpamConfig = serde_json::from_str(&serde_json::to_string(&read).unwrap()).unwrap();
    assert_eq!(read, again);
    let layout = read.layout().unwrap();
    let free: Vec<_> = layout.pools[0].free.iter().map(|(a, b)| (a & 0xff, b & 0xff)).collect();
    assert_eq!(free, [(10, 10), (12, 49), (51, 99), (128, 191)]);
    assert_eq!(layout.pools[0].size(), 1 + 38 + 49 + 64 + 1);
}

#[test]
fn addresses_nobody_may_have_are_left_out_except_where_there_would_be_none() {
    let ends = |subnet: &str| {
        let layout =
            config(&format!(r#"{{ "pools": [ {{ "name": "p", "subnet": "{subnet}" }} ] }}"#)).layout().unwrap();
        let pool = &layout.pools[0];
        let base = pool.free.iter().next().unwrap().0;
        let network = match pool.subnet.network() {
            std::net::IpAddr::V4(ip) => u32::from(ip).into(),
            std::net::IpAddr::V6(ip) => u128::from(ip),
        };
        (base - network, pool.size())
    };
    assert_eq!(ends("10.0.0.0/30"), (1, 2));
    assert_eq!(ends("10.0.0.0/31"), (0, 2));
    assert_eq!(ends("10.0.0.0/32"), (0, 1));
    assert_eq!(ends("255.255.255.255/32"), (0, 1));
    assert_eq!(ends("0.0.0.0/0"), (1, (1 << 32) - 2));
    assert_eq!(ends("fd00::/126"), (1, 3));
    assert_eq!(ends("fd00::/127"), (0, 2));
    assert_eq!(ends("fd00::/128"), (0, 1));
    assert_eq!(ends("fd00::/64"), (1, (1 << 64) - 1));
    assert_eq!(ends("::/0"), (1, u128::MAX - (1 << 32)));
}
