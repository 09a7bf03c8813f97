//! Devices that somebody hands out.

use super::error::{AttachError, TeardownError};
use super::{AttachRequest, Engine};
use crate::journal::Record;
use crate::model::{AttachmentKey, MacAddr};
use crate::netns::NetNs;
use crate::plan::{Undo, lent_mark};
use crate::provider::{DeviceRequest, DeviceWish, LentDevice};

impl Engine {
    /// Has a device given to the attachment.
    pub(super) fn lend_device(
        &self,
        request: &AttachRequest<'_>,
        wish: DeviceWish,
        mac: MacAddr,
    ) -> Result<LentDevice, AttachError> {
        let kind = request.link.driver().kind();
        let source = self.devices.as_ref().ok_or(AttachError::NoDeviceSource { kind })?;
        let netns = request.pod.path.to_owned();
        let wanted = DeviceRequest { attachment: request.key.clone(), wish, mac, netns };
        Ok(self.host.0.run_here_or_there(|| source.lend(&wanted))??)
    }

    /// Whether a source says that the attachment has a device.
    pub(super) fn has_device(&self, key: &AttachmentKey) -> Result<bool, TeardownError> {
        let Some(source) = &self.devices else { return Ok(false) };
        Ok(self.host.0.run_here_or_there(|| source.is_lent(key))??)
    }

    /// In what a device is not what it was lent as, for a link of this kind.
    pub(super) fn missing_of_device(
        &self,
        key: &AttachmentKey,
        device: &LentDevice,
        kind: &'static str,
    ) -> Result<Vec<String>, AttachError> {
        let source = self.devices.as_ref().ok_or(AttachError::NoDeviceSource { kind })?;
        Ok(self.host.0.run_here_or_there(|| source.missing(key, device))??)
    }

    /// Has whatever the attachment has taken back.
    pub(super) fn release_devices(&self, key: &AttachmentKey) -> Result<(), TeardownError> {
        let Some(source) = &self.devices else { return Ok(()) };
        Ok(self.host.0.run_here_or_there(|| source.release(key))??)
    }

    /// As [`release_devices`](Self::release_devices), of one that the attachment is known to have. A source that has
    /// never heard of it says that nothing is to be done: then it is looked for in the pod.
    pub(super) fn release_device(
        &self,
        key: &AttachmentKey,
        device: &LentDevice,
        pod: Option<&NetNs>,
    ) -> Result<(), TeardownError> {
        if self.devices.is_none() {
            return Err(TeardownError::NoDeviceSource { device: device.id.clone() });
        }
        let known = self.has_device(key)?;
        self.release_devices(key)?;
        let Some(pod) = pod.filter(|_| !known) else { return Ok(()) };
        let alias = lent_mark(key, &device.name);
        let left = self.pod_socket(pod)?.link(&key.ifname)?.is_some_and(|link| link.alias.as_ref() == Some(&alias));
        if left {
            Err(TeardownError::StillLent { device: device.id.clone(), ifname: key.ifname.clone() })
        } else {
            Ok(())
        }
    }
}

impl Record {
    /// The device that a source gave, if one did.
    pub(super) fn lent_device(&self) -> Option<LentDevice> {
        self.undo.iter().find_map(|undo| match undo {
            Undo::ReleaseDevice(device) => Some((**device).clone()),
            _ => None,
        })
    }
}
