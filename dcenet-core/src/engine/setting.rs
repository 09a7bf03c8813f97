//! Settings of namespaces below `/proc/sys/net` that attachments ask for, each of which gets back the value that it had.
//!
//! Several attachments may need one setting. Whoever is the first writes down what it was, the others take that over from
//! his record, and whoever is the last gives it back. Who reads what one is until he has recorded it, and who gives it back, holds
//! a lock, and so does who makes one of the host: runtimes attach the networks of a pod side by side. It is that of the records and
//! not one of the pod's namespace, which the pod's own processes could hold for good.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::apply::Session;
use super::check::Drift;
use super::error::{AttachError, StepError, TeardownError};
use super::{AttachRequest, Engine};
use crate::journal::{JournalError, Record, SettingsLock};
use crate::link::PlanError;
use crate::model::{AttachmentKey, IfName};
use crate::netlink::{self, LinkView, gated};
use crate::netns::{NetNs, NetNsError};
use crate::plan::{Operation, Plan, Step, Target, Undo, is_mark_of};
use crate::proc_sys::{self, read};
use crate::sysctl::{Setting, Sysctls, dotted, invalid, same_value};

/// Adds to a plan what a configuration sets: for the whole pod first of all, of its device before that is up.
///
/// # Errors
/// Where one is set twice.
pub(super) fn add_to(plan: &mut Plan, sysctls: &Sysctls, ifname: &IfName) -> Result<(), PlanError> {
    let (own, of_pod): (Vec<_>, Vec<_>) = sysctls.settings(ifname)?.into_iter().partition(|s| s.pattern.is_some());
    if own.is_empty() && of_pod.is_empty() {
        return Ok(());
    }
    let sets_up = |step: &Step| match &step.operation {
        Operation::Up { link, .. } => step.target == Target::Pod && link == ifname,
        _ => false,
    };
    let up = plan.steps.iter().position(sets_up).unwrap_or(plan.steps.len());
    let own = own.into_iter().map(|s| write_step(Target::Pod, s.name, s.value));
    plan.steps.splice(up..up, own);
    plan.steps.splice(0..0, of_pod.into_iter().map(|s| restored(Target::Pod, s.name, s.value)));
    Ok(())
}

/// Writes a setting.
pub(super) fn write_step(target: Target, name: String, value: String) -> Step {
    Step::new(target, Operation::WriteSetting { name, value })
}

/// The same, taken back. What it was is filled in before it is recorded.
pub(super) fn restored(target: Target, name: String, value: String) -> Step {
    let undo = Undo::RestoreSetting { target, name: name.clone(), before: String::new(), asked: value.clone() };
    write_step(target, name, value).undone_by(undo)
}

impl Engine {
    /// The lock of settings, where a plan makes any: also of one's own device, which nobody gives back, but another attachment may
    /// want to be something else.
    pub(super) fn lock_settings_of(
        &self,
        plan: &Plan,
        request: &AttachRequest<'_>,
    ) -> Result<Option<SettingsLock>, JournalError> {
        let makes = plan.restores() || !request.link.sysctl().is_empty();
        makes.then(|| self.journal.lock_settings()).transpose()
    }

    /// Fills in what settings are now, and refuses those that cannot be set or be given back, before anything is changed. Where
    /// any is made the caller holds the lock of settings until the plan is recorded.
    pub(super) fn look_at_settings(&self, plan: &mut Plan, request: &AttachRequest<'_>) -> Result<(), AttachError> {
        let settings = request.link.sysctl().settings(&request.key.ifname)?;
        let undos = plan.steps.iter_mut().filter_map(|step| step.undo.as_mut());
        let undos: Vec<&mut Undo> = undos.filter(|undo| matches!(undo, Undo::RestoreSetting { .. })).collect();
        if settings.is_empty() && undos.is_empty() {
            return Ok(());
        }
        let pod = request.pod.netns;
        self.run_in(pod, || settings.iter().try_for_each(is_settable))??;
        self.refuse_contrary(&settings, request)?;
        for undo in undos {
            let Undo::RestoreSetting { target, name, before, .. } = undo else { continue };
            let netns = if *target == Target::Host { &self.host.0 } else { pod };
            let holder = self.holder(&request.key, (*target, name), netns, |_| Ok::<_, JournalError>(true))?;
            if let Some(was) = holder.as_ref().and_then(|record| held(record, *target, name)) {
                was.clone_into(before);
                continue;
            }
            *before = self.run_in(netns, || read_or_default(name))?.map_err(|e| unreadable(name, &e))?;
        }
        Ok(())
    }

    /// Refuses settings of which another attachment of the pod asks for another value, under whatever name.
    fn refuse_contrary(&self, settings: &[Setting], request: &AttachRequest<'_>) -> Result<(), AttachError> {
        if settings.is_empty() {
            return Ok(());
        }
        let contrary = |record: &Record| {
            let theirs = record.link.sysctl().settings(&record.key.ifname).unwrap_or_default();
            settings.iter().find_map(|ours| {
                let same = theirs.iter().find(|theirs| canonical(&theirs.name) == canonical(&ours.name))?;
                (!same_value(&same.value, &ours.value)).then(|| (ours.clone(), same.value.clone()))
            })
        };
        // The key under which a record has them.
        let found = self.journal.first_with("sysctl", |record| {
            let is_other = record.key != request.key && record.boot == self.journal.boot();
            Ok::<_, JournalError>(is_other && is_in(record, request.pod.netns) && contrary(record).is_some())
        })?;
        let Some((record, (ours, value))) =
            found.and_then(|record| contrary(&record).map(|contrary| (record, contrary)))
        else {
            return Ok(());
        };
        let reason = format!(
            "attachment {} of the same pod has set it to {value:?}; ask for the same value, or for none",
            record.key
        );
        Err(invalid(format!("{} = {}", dotted(&ours.name), ours.value), reason).into())
    }

    /// What settings of the pod are, as the kernel says it.
    pub(super) fn settings_of(
        &self,
        sysctls: &Sysctls,
        ifname: &IfName,
        pod: &NetNs,
    ) -> Result<BTreeMap<String, String>, StepError> {
        if sysctls.is_empty() {
            return Ok(BTreeMap::new());
        }
        // They were read before, or written just now.
        let names = sysctls.settings(ifname).unwrap_or_default().into_iter().map(|s| s.name);
        Ok(self.run_in(pod, || names.filter_map(|name| read(&name).ok().map(|value| (name, value))).collect())?)
    }

    /// Makes settings again what they were made, where somebody changed them.
    pub(super) fn renew_settings(&self, record: &Record, pod: &NetNs) -> Result<(), StepError> {
        for undo in &record.undo {
            if let Undo::RestoreSetting { target: Target::Host, name, asked, .. } = undo {
                let _lock = self.journal.lock_settings()?;
                self.write_setting(&self.host.0, name, asked)?;
            }
        }
        let changed = self.changed_settings(record, pod)?;
        if changed.is_empty() {
            return Ok(());
        }
        let is_changed = |setting: &Setting| {
            changed.iter().any(|drift| matches!(drift, Drift::SettingChanged { name, .. } if *name == setting.name))
        };
        let settings = record.link.sysctl().settings(&record.key.ifname).unwrap_or_default();
        let settings: Vec<&Setting> = settings.iter().filter(|s| is_changed(s)).collect();
        write_all(&settings, |s| self.write_setting(pod, &s.name, &s.value)).map_err(|(_, error)| error)
    }

    /// Writes a setting, unless it is so: writing to `all/forwarding` what it is sets every link all the same.
    pub(super) fn write_setting(&self, netns: &NetNs, name: &str, value: &str) -> Result<(), StepError> {
        let written = gated("write setting", || self.run_in(netns, || write_if_other(name, value)))?;
        written.map_err(|source| StepError::Setting { name: name.to_owned(), value: value.to_owned(), source })
    }

    /// Gives a setting its value back, unless another attachment needs it. For one of the host the caller has ended the
    /// attachment's translation.
    pub(super) fn restore_setting(
        &self,
        key: &AttachmentKey,
        netns: &NetNs,
        (target, name, before): (Target, &str, &str),
    ) -> Result<(), TeardownError> {
        let _lock = self.journal.lock_settings()?;
        let needs = |record: &Record| match target {
            // Who only begins makes it before his device. Devices go before settings are given back, so that of two who go at the
            // same time the last one finds nobody.
            Target::Pod => Ok(record.done.is_none() || self.bears_device_of(record, netns)?),
            // Its record may outlive what it needs the setting for, when both go at the same time; and who only begins makes it
            // when he translates already, and under the lock.
            Target::Host => self.is_translating(record),
        };
        if self.holder::<TeardownError>(key, (target, name), netns, needs)?.is_some() {
            return Ok(());
        }
        match gated("restore setting", || self.run_in(netns, || write_if_other(name, before)))? {
            // The device, or the family, is gone.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(TeardownError::Setting { name: name.to_owned(), value: before.to_owned(), source }),
            Ok(()) => Ok(()),
        }
    }

    /// Whether the attachment's device is in the pod, also where the pod's own processes have renamed it or changed its alias.
    fn bears_device_of(&self, record: &Record, pod: &NetNs) -> Result<bool, TeardownError> {
        let own = record.done.iter().flat_map(|done| &done.interfaces).find(|i| i.sandbox.is_some()).map(|i| i.mac);
        let is_its = |link: &LinkView| {
            let is_marked = link.alias.as_deref().is_some_and(|alias| is_mark_of(&record.key, alias));
            is_marked || own.is_some() && link.mac == own && link.name == record.key.ifname.as_str()
        };
        let links = self.pod_socket(pod)?.dump(&netlink::link_dump(None))?;
        Ok(links.iter().filter_map(|reply| LinkView::parse(&reply.payload)).any(|link| is_its(&link)))
    }

    /// Settings of the pod that are not what they were made.
    pub(super) fn changed_settings(&self, record: &Record, pod: &NetNs) -> Result<Vec<Drift>, NetNsError> {
        let Some(made) = record.done.as_ref().map(|done| &done.settings).filter(|made| !made.is_empty()) else {
            return Ok(Vec::new());
        };
        self.changed(Target::Pod, pod, made)
    }

    /// Settings of a namespace that are not so.
    pub(super) fn changed(
        &self,
        target: Target,
        netns: &NetNs,
        made: &BTreeMap<String, String>,
    ) -> Result<Vec<Drift>, NetNsError> {
        self.run_in(netns, || {
            let is = made.iter().map(|(name, value)| (name, value, read(name).ok()));
            let differ = is.filter(|(_, value, is)| is.as_deref() != Some(value.as_str()));
            differ
                .map(|(name, value, is)| Drift::SettingChanged { target, name: name.clone(), value: value.clone(), is })
                .collect()
        })
    }

    /// The first attachment but that of `key` that asked for a setting of this namespace, under whatever name, and `needs` it.
    fn holder<E: From<JournalError>>(
        &self,
        key: &AttachmentKey,
        (target, name): (Target, &str),
        netns: &NetNs,
        needs: impl Fn(&Record) -> Result<bool, E>,
    ) -> Result<Option<Record>, E> {
        let wanted = |record: &Record| -> Result<bool, E> {
            let is_other = record.key != *key && record.boot == self.journal.boot();
            if !is_other || held(record, target, name).is_none() {
                return Ok(false);
            }
            let is_here = match target {
                Target::Host => record.host.is_none_or(|host| host == netns.id()),
                Target::Pod => is_in(record, netns),
            };
            Ok(is_here && needs(record)?)
        };
        let other = ALIASES.iter().find_map(|names| match names {
            [one, other] | [other, one] if *one == name => Some(*other),
            _ => None,
        });
        for name in [name].into_iter().chain(other) {
            if let Some(record) = self.journal.first_with(name, wanted)? {
                return Ok(Some(record));
            }
        }
        Ok(None)
    }
}

impl Session<'_> {
    /// Does steps that write settings of one target. An error comes with its step's place among them.
    pub(super) fn write_settings(&self, steps: &[Step]) -> Result<(), (usize, StepError)> {
        write_all(steps, |step| {
            let Operation::WriteSetting { name, value } = &step.operation else { return Ok(()) };
            let _lock = match &step.undo {
                Some(Undo::RestoreSetting { target: Target::Host, .. }) => Some(self.engine.journal.lock_settings()?),
                _ => None,
            };
            match self.engine.write_setting(self.netns(step.target), name, value) {
                Err(StepError::Setting { source, .. })
                    if source.raw_os_error().is_some_and(|errno| step.tolerate.contains(&errno)) =>
                {
                    Ok(())
                }
                written => written,
            }
        })
    }
}

/// Writes settings one by one, and what the kernel finds invalid once more after the others: it ties some to each other, as
/// `ip_local_port_range` to `ip_unprivileged_port_start` (`ipv4_local_port_range` in `net/ipv4/sysctl_net_ipv4.c`). An error
/// comes with its setting's place.
fn write_all<T>(settings: &[T], mut write: impl FnMut(&T) -> Result<(), StepError>) -> Result<(), (usize, StepError)> {
    let mut again = Vec::new();
    for (place, setting) in settings.iter().enumerate() {
        match write(setting) {
            Ok(()) => {}
            Err(StepError::Setting { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => again.push(place),
            Err(error) => return Err((place, error)),
        }
    }
    again.into_iter().try_for_each(|place| write(&settings[place]).map_err(|error| (place, error)))
}

/// Whether an attachment is of this namespace. Its number may be of one that is no more: the kernel gives the lowest that is
/// free (`ns_alloc_inum` in `include/linux/proc_ns.h`), and a record outlives a pod that nobody has detached.
fn is_in(record: &Record, netns: &NetNs) -> bool {
    record.netns == netns.id() && NetNs::open(&record.netns_path).is_ok_and(|found| found.id() == netns.id())
}

/// Settings that have two names (`devinet_sysctl_forward` in `net/ipv4/devinet.c`).
const ALIASES: [[&str; 2]; 1] = [["ipv4/conf/all/forwarding", "ipv4/ip_forward"]];

/// The one name of a setting.
fn canonical(name: &str) -> &str {
    ALIASES.iter().find(|names| names.contains(&name)).map_or(name, |[first, _]| first)
}

/// What a setting was before any attachment changed it, by the record of one that did.
fn held<'r>(record: &'r Record, target: Target, name: &str) -> Option<&'r str> {
    record.undo.iter().find_map(|undo| match undo {
        Undo::RestoreSetting { target: its, name: of, before, .. }
            if *its == target && canonical(of) == canonical(name) =>
        {
            Some(before.as_str())
        }
        _ => None,
    })
}

/// Refuses what the calling thread's namespace does not have, or does not let be written.
fn is_settable(setting: &Setting) -> Result<(), PlanError> {
    let name = setting.pattern.as_ref().unwrap_or(&setting.name);
    let refuse = |reason: String| Err(invalid(dotted(&setting.name), reason));
    if setting.pattern.is_some() {
        // Some families have no pattern of devices to come: the device itself will tell.
        let directory = proc_sys::path(name);
        if directory.parent().is_some_and(|d| !d.exists() && d.parent().is_some_and(Path::exists)) {
            return Ok(());
        }
    }
    match std::fs::metadata(proc_sys::path(name)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => refuse(
            "the pod's namespace has no such setting: it is of the whole host, or this kernel lacks it; drop it, or see \
             `sysctl -a` in a pod"
                .to_owned(),
        ),
        Err(error) => refuse(error.to_string()),
        Ok(found) if !found.is_file() => refuse("is not one setting but several; name one of them".to_owned()),
        Ok(found) if found.mode() & 0o200 == 0 => {
            refuse("cannot be written from a pod's namespace: it is of the whole host; drop it".to_owned())
        }
        Ok(_) => Ok(()),
    }
}

fn unreadable(name: &str, error: &io::Error) -> PlanError {
    invalid(dotted(name), format!("cannot be read, and so not be given back when the pod goes: {error}; drop it"))
}

/// As a device to come has it, where the device is not there.
fn read_or_default(name: &str) -> io::Result<String> {
    match read(name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut parts: Vec<&str> = name.split('/').collect();
            match parts.get_mut(2) {
                Some(device) => *device = "default",
                None => return Err(error),
            }
            read(&parts.join("/"))
        }
        found => found,
    }
}

fn write_if_other(name: &str, value: &str) -> io::Result<()> {
    match read(name) {
        Ok(is) if same_value(&is, value) => Ok(()),
        _ => proc_sys::write(name, value),
    }
}
