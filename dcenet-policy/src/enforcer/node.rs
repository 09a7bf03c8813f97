//! What a host keeps for its policy while no process of ours runs: maps and default programs, pinned.

use std::os::fd::AsFd;

use dcenet_ebpf::abi::{self, Sizes};
use dcenet_ebpf::attach::Direction as HookDirection;
use dcenet_ebpf::datapath::{Slot, answer};
use dcenet_ebpf::loader::{LoadRequest, Loader};
use dcenet_ebpf::maps::{Map, ProgramArray};
use dcenet_ebpf::object::MapSpec;
use dcenet_ebpf::pin::Pins;
use dcenet_ebpf::program::Program;

use super::config::DefaultVerdict;
use super::{EnforcerError, Lowering};

/// The pin of a default program, for devices on the host or in pods. What the pod sends enters the host on its end's ingress
/// hook, and that is the direction for devices in pods, too.
pub(crate) const fn default_pin(verdict: DefaultVerdict, direction: HookDirection, on_host: bool) -> &'static str {
    match (verdict, direction, on_host) {
        (DefaultVerdict::Deny, HookDirection::Ingress, true) => "deny_from_pod",
        (DefaultVerdict::Deny, HookDirection::Egress, true) => "deny_to_pod",
        (DefaultVerdict::Allow, HookDirection::Ingress, true) => "allow_from_pod",
        (DefaultVerdict::Allow, HookDirection::Egress, true) => "allow_to_pod",
        (DefaultVerdict::Deny, HookDirection::Ingress, false) => "deny_from_one_pod",
        (DefaultVerdict::Deny, HookDirection::Egress, false) => "deny_to_one_pod",
        (DefaultVerdict::Allow, HookDirection::Ingress, false) => "allow_from_one_pod",
        (DefaultVerdict::Allow, HookDirection::Egress, false) => "allow_to_one_pod",
    }
}

/// Maps whose contents mean something only together with the numbers of one owner's compiler. They live as long as the
/// owner and the programs that it has put in force; a new owner makes its own and leaves the old to the old programs.
const OWNERS: [&str; 5] = [abi::CLASS_V4, abi::MEMBERS_V6, abi::CLASS_V6, abi::NODES_V6, abi::REJECTS];

/// The maps of a node, open: those that are pinned, and those of this owner.
#[derive(Debug)]
pub(crate) struct NodeMaps {
    maps: Vec<(String, Map)>,
}

impl NodeMaps {
    /// Takes over the pinned maps and makes what is missing.
    pub(crate) fn open(pins: &Pins, sizes: &Sizes) -> Result<Self, EnforcerError> {
        let mut maps = Vec::new();
        for spec in sizes.shared_maps() {
            let map = if OWNERS.contains(&spec.name.as_str()) { create(&spec)? } else { open_or_make(pins, &spec)? };
            maps.push((spec.name, map));
        }
        Ok(Self { maps })
    }

    /// The map of a name of [`abi`].
    pub(crate) fn get(&self, name: &str) -> Result<Map, EnforcerError> {
        let found = self.maps.iter().find(|(n, _)| n == name).map(|(_, map)| map);
        let missing = || EnforcerError::Lowering(format!("the datapath has no map {name:?}").into());
        duplicate(name, found.ok_or_else(missing)?)
    }

    /// The maps that an object names, for a loader.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&str, &Map)> {
        self.maps.iter().map(|(name, map)| (name.as_str(), map))
    }
}

pub(crate) fn create(spec: &MapSpec) -> Result<Map, EnforcerError> {
    Map::create(spec).map_err(|source| EnforcerError::Map { name: spec.name.clone(), source: source.into() })
}

fn duplicate(name: &str, map: &Map) -> Result<Map, EnforcerError> {
    let failed =
        |source: Box<dyn std::error::Error + Send + Sync>| EnforcerError::Map { name: name.to_owned(), source };
    let fd = map.as_fd().try_clone_to_owned().map_err(|e| failed(e.into()))?;
    Map::from_fd(fd).map_err(|e| failed(e.into()))
}

pub(crate) fn open_or_make(pins: &Pins, spec: &MapSpec) -> Result<Map, EnforcerError> {
    let Some(fd) = pins.get(&spec.name)? else {
        let map = create(spec)?;
        pins.pin(&spec.name, &map)?;
        return Ok(map);
    };
    let failed = |source| EnforcerError::Map { name: spec.name.clone(), source };
    let map = Map::from_fd(fd).map_err(|e| failed(e.into()))?;
    let info = map.info();
    let fields = [
        ("type", info.kind, spec.kind.number()),
        ("key size", info.key_size, spec.key_size),
        ("value size", info.value_size, spec.value_size),
        ("size", info.max_entries, spec.max_entries),
    ];
    match fields.into_iter().find(|(_, found, wanted)| found != wanted) {
        None => Ok(map),
        Some((what, found, wanted)) => Err(EnforcerError::OtherLayout { map: spec.name.clone(), what, found, wanted }),
    }
}

/// Makes sure that the default programs are pinned and are those of this release.
pub(crate) fn pin_defaults(
    pins: &Pins,
    maps: &NodeMaps,
    loader: &dyn Loader,
    lowering: &dyn Lowering,
) -> Result<(), EnforcerError> {
    for (verdict, slot) in DefaultVerdict::ALL.into_iter().flat_map(|v| [(v, Slot::Class), (v, Slot::Nobody)]) {
        for (direction, program) in load_default(maps, loader, lowering, verdict, slot)? {
            let pin = default_pin(verdict, direction, slot == Slot::Class);
            match pins.get(pin)? {
                None => pins.pin(pin, &program)?,
                Some(fd) => {
                    let pinned = Program::from_fd(fd)
                        .map_err(|e| EnforcerError::Map { name: pin.to_owned(), source: e.into() })?;
                    if pinned.info().tag != program.info().tag {
                        pins.replace(pin, &program)?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Puts the programs that answer what rules reject in their places.
pub(crate) fn place_answerers(
    maps: &NodeMaps,
    loader: &dyn Loader,
    lowering: &dyn Lowering,
) -> Result<(), EnforcerError> {
    let lowered = |error| EnforcerError::Lowering(Box::new(error));
    let elf = answer::programs(&lowering.sizes()).map_err(lowered)?.to_elf();
    let elf = elf.map_err(|error| EnforcerError::Lowering(error.into()))?;
    let answered = maps.get(abi::ANSWERED)?;
    let mut loaded = loader.load(&elf, &LoadRequest { maps: &[(abi::ANSWERED, answered.as_fd())] })?;
    let failed = |error| EnforcerError::map(abi::ANSWERERS, error);
    let places = ProgramArray::new(maps.get(abi::ANSWERERS)?).map_err(failed)?;
    for (place, name) in (0..).zip(answer::PROGRAMS) {
        let missing = || EnforcerError::Lowering(format!("the object has no program {name:?}").into());
        places.set(place, &loaded.take_program(name).ok_or_else(missing)?).map_err(failed)?;
    }
    Ok(())
}

/// Loads default programs, by the hook of the host's end.
pub(crate) fn load_default(
    maps: &NodeMaps,
    loader: &dyn Loader,
    lowering: &dyn Lowering,
    verdict: DefaultVerdict,
    slot: Slot,
) -> Result<[(HookDirection, Program); 2], EnforcerError> {
    let object = lowering.default_object(verdict, slot).map_err(EnforcerError::Lowering)?;
    let used: Vec<_> =
        maps.all().filter(|(name, _)| object.maps.iter().any(|m| m == name)).map(|(n, m)| (n, m.as_fd())).collect();
    let mut loaded = loader.load(&object.elf, &LoadRequest { maps: &used })?;
    let mut take = |direction| {
        let name = program_name(direction, slot);
        let missing = || EnforcerError::Lowering(format!("the default object has no program {name:?}").into());
        Ok::<_, EnforcerError>((direction, loaded.take_program(name).ok_or_else(missing)?))
    };
    Ok([take(HookDirection::Ingress)?, take(HookDirection::Egress)?])
}

/// The names of the programs in an object of [`Lowering`].
pub(crate) const fn program_name(direction: HookDirection, slot: Slot) -> &'static str {
    let [from_pod, to_pod] = slot.program_names();
    match direction {
        HookDirection::Ingress => from_pod,
        HookDirection::Egress => to_pod,
    }
}
