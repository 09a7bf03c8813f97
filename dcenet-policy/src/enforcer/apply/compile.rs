//! Compiling what is to be carried out.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::arrays::has_room;
use super::{Applier, names};
use crate::compiler::{CompileError, Compiler, Update};
use crate::enforcer::EnforcerError;
use crate::isolation::Fault;
use crate::model::{Cluster, PodId};

/// An update, the addresses whose names it leaves out, and the compiler of before where it may have to be put back.
type Compiled = (Update, BTreeSet<IpAddr>, Option<Compiler>);

impl Applier {
    /// Compiles everything but names, of which it leaves those out that programs on devices cannot tell together with what else
    /// has changed of their addresses. `pods`: nothing else has changed.
    pub(super) fn compile_named(
        &mut self,
        cluster: &Cluster,
        pods: Option<&BTreeSet<PodId>>,
    ) -> Result<Compiled, EnforcerError> {
        let update = self.compile(cluster, pods)?;
        self.astray.clear();
        self.unfinished = true;
        let misjudged = self.misjudged(&update, &cluster.names);
        if misjudged.is_empty() {
            return Ok((update, misjudged, None));
        }
        self.astray.extend(&misjudged);
        let names = cluster.names.without(&misjudged);
        let update = self.compile(&Cluster { names, ..cluster.clone() }, Some(&BTreeSet::new()))?;
        self.astray.clear();
        Ok((update, misjudged, None))
    }

    fn compile(&mut self, cluster: &Cluster, pods: Option<&BTreeSet<PodId>>) -> Result<Update, CompileError> {
        let Self { compiler, tables, sizes, astray, .. } = self;
        let room = |update: &Update| has_room(update, sizes, tables);
        match pods {
            None => compiler.update_within(cluster, room),
            Some(pods) => compiler.update_parts_within(cluster, pods, astray, room),
        }
    }

    /// Compiles names that are others for some addresses. Where it fails, the compiler is as it was before.
    pub(super) fn compile_names(
        &mut self,
        cluster: &Cluster,
        renamed: &BTreeSet<IpAddr>,
        faults: &[Fault],
    ) -> Result<(Update, Option<Compiler>), EnforcerError> {
        let Self { compiler, tables, sizes, astray, .. } = self;
        let mut room = |update: &Update| has_room(update, sizes, tables);
        astray.extend(renamed);
        if let Some(compiled) = compiler.update_names_within(cluster, astray, &mut room) {
            return Ok(compiled);
        }
        let before = compiler.clone();
        match names::update_for_names(compiler, cluster, faults, room) {
            Ok(update) => Ok((update, Some(before))),
            Err(error) => {
                *compiler = before;
                Err(error)
            }
        }
    }
}
