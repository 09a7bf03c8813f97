//! The device that a runtime chose for the pod.

use serde_json::Value;

use super::config::{field, says_nothing};
use super::{CniError, ErrorCode, NetConf};
use crate::link::LinkConfig;

/// The capability (CNI conventions, "Dynamic Plugin specific fields"), and the key at the top.
pub(in crate::cni) const DEVICE_ID: &str = "deviceID";

impl NetConf {
    /// The link with the device that the runtime chose: by the capability `deviceID`, else by the key of this name at the top,
    /// where meta plugins put it. It goes before the link's own. Only links of the kind `sriov` take one.
    ///
    /// # Errors
    /// Code 7 for a value that is no string.
    pub(super) fn with_device(&self, link: LinkConfig) -> Result<LinkConfig, CniError> {
        let LinkConfig::Sriov(mut config) = link else { return Ok(link) };
        let at_top = || self.key(DEVICE_ID).filter(|value| !says_nothing(value)).map(|value| (DEVICE_ID, value));
        let asked = self.asked(DEVICE_ID).map(|value| ("runtimeConfig.deviceID", value)).or_else(at_top);
        match asked {
            Some((_, Value::String(device))) => config.device = Some(device.clone()),
            Some((at, other)) => {
                return Err(field(at, format!("{other} is not a string; give a PCI address, as \"0000:3b:02.1\"")));
            }
            None => {}
        }
        Ok(LinkConfig::Sriov(config))
    }

    /// Refuses a device at the top for a link of another kind, which would leave it unused without a word.
    ///
    /// # Errors
    /// Code 2, with the remedy.
    pub(super) fn refuse_device(&self) -> Result<(), CniError> {
        match self.key(DEVICE_ID).filter(|value| !says_nothing(value)) {
            None => Ok(()),
            Some(value) => Err(CniError::new(
                ErrorCode::UnsupportedField,
                format!("{DEVICE_ID}: {value} cannot be honoured by this kind of link; use the kind sriov, or drop it"),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn chosen(link: Value, rest: Value) -> Result<LinkConfig, CniError> {
        let mut conf = json!({ "cniVersion": "1.1.0", "name": "fast", "type": "dcenet", "link": link });
        for (key, value) in rest.as_object().unwrap() {
            conf[key] = value.clone();
        }
        let conf = NetConf::parse(conf.to_string().as_bytes()).unwrap();
        let link = LinkConfig::read(conf.key("link").unwrap()).unwrap();
        conf.with_device(link)
    }

    #[test]
    fn the_runtimes_device_goes_before_the_links_own() {
        let link = json!({ "kind": "sriov", "device": "0000:3b:02.0" });
        let capability = json!({ "runtimeConfig": { "deviceID": "0000:3b:02.1" }, "deviceID": "0000:3b:02.2" });
        for (rest, device) in [
            (json!({}), "0000:3b:02.0"),
            (json!({ "deviceID": "0000:3b:02.2" }), "0000:3b:02.2"),
            (capability, "0000:3b:02.1"),
            (json!({ "runtimeConfig": { "deviceID": "" } }), "0000:3b:02.0"),
        ] {
            match chosen(link.clone(), rest) {
                Ok(LinkConfig::Sriov(config)) => assert_eq!(config.device.as_deref(), Some(device)),
                other => panic!("{other:?}"),
            }
        }
        let error = chosen(link, json!({ "deviceID": 7 })).unwrap_err();
        assert!(error.message.starts_with("deviceID: 7 is not a string"), "{error}");
    }

    #[test]
    fn a_device_for_a_link_of_another_kind_is_refused_also_at_the_top() {
        let conf = |device: Value| {
            let link = json!({ "kind": "bridge", "bridge": "br0" });
            let conf =
                json!({ "cniVersion": "1.1.0", "name": "a", "type": "dcenet", "link": link, "deviceID": device });
            NetConf::parse(conf.to_string().as_bytes()).unwrap()
        };
        let error = conf(json!("0000:3b:02.1")).refuse_device().unwrap_err();
        assert_eq!(error.code.number(), 2);
        assert!(error.message.starts_with("deviceID: \"0000:3b:02.1\" cannot be honoured"), "{error}");
        conf(json!("")).refuse_device().unwrap();
    }
}
