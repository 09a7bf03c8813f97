//! What an attacher keeps of devices that are no more.

use std::sync::Arc;

use dcenet_core::model::IfIndex;
use dcenet_core::test_support::{Rung, require_with};
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::attach::{
    AttachError, Attached, Attacher, ClsactAttacher, Direction, Hook, Tag, TcxAttacher, verdict,
};
use dcenet_ebpf::insn;
use dcenet_ebpf::object::ProgramKind;
use dcenet_ebpf::pin::Pins;
use dcenet_ebpf::probe::Features;
use dcenet_ebpf::program::Program;
use dcenet_policy::enforcer::Tools;

use crate::world::*;

/// Attaches by clsact, for the owner's programs read a class, beside links that were pinned before.
struct Both {
    links: TcxAttacher,
}

impl Attacher for Both {
    fn attach_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Option<Attached>, AttachError> {
        ClsactAttacher.attach_tagged(hook, program, tag)
    }

    fn replace_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Attached, AttachError> {
        ClsactAttacher.replace_tagged(hook, program, tag)
    }

    fn devices(&self) -> Result<Vec<IfIndex>, AttachError> {
        ClsactAttacher.devices()
    }

    fn chain(&self, hook: Hook) -> Result<Vec<Attached>, AttachError> {
        ClsactAttacher.chain(hook)
    }

    fn detach(&self, hook: Hook) -> Result<bool, AttachError> {
        ClsactAttacher.detach(hook)
    }

    fn forget_vanished(&self) -> Result<usize, AttachError> {
        self.links.forget_vanished()
    }
}

#[test]
fn an_owner_that_starts_removes_the_pins_of_devices_that_have_vanished() {
    let ready = require_with(Rung::Kernel, || {
        (!Features::probe().is_ok_and(|f| f.tcx)).then(|| "the kernel has no tcx (Linux 6.6)".to_owned())
    });
    if !ready {
        return;
    }
    let world = World::new();
    let pins = Pins::open(world.host.directory().join("links")).unwrap();
    let links = TcxAttacher::new(pins.clone());
    let mut code = Asm::program("pass", ProgramKind::Classifier);
    code.ret(verdict::UNSPEC);
    let pass = Program::load(ProgramKind::Classifier, "pass", &insn::encode(code.finish().unwrap().insns())).unwrap();
    let root = world.host.root();
    root.sh("ip link add gone0 type veth peer name gone1; ip link add stays0 type veth peer name stays1");
    for device in ["gone0", "stays0"] {
        let hook = Hook { device: root.link(device).unwrap().index, direction: Direction::Ingress };
        root.run(|| links.attach(hook, &pass, device)).unwrap();
    }
    root.sh("ip link del gone0");
    assert_eq!(pins.list().unwrap().len(), 2, "nobody has removed the pin yet");
    let tools = Tools { attacher: Arc::new(Both { links }), ..tools() };
    let owner = world.open(tools);
    let left = pins.list().unwrap();
    assert!(matches!(&left[..], [pin] if pin.ends_with("-stays0")), "{left:?}");
    owner.uninstall().unwrap();
    pins.unmount().unwrap();
}
