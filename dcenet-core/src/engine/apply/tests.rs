use super::super::Host;
use super::*;
use crate::model::VlanId;
use crate::plan::Tagging;

#[test]
fn a_port_is_set_up_only_when_it_is_in_its_vlans() {
    let directory = tempfile::tempdir().unwrap();
    let here = || NetNs::of_this_thread().unwrap();
    let engine = Engine::new(Host(here()), directory.path(), None).unwrap();
    let pod = here();
    let mut session = Session::new(&engine, &pod, engine.host_socket().unwrap());
    let [bridge, port] = ["dc0", "dc1"].map(|name| name.parse::<IfName>().unwrap());
    for (link, index) in [(&bridge, 7), (&port, 8)] {
        session.know_index(Target::Host, link, IfIndex::new(index).unwrap());
    }
    let vlan = |id: u16| VlanId::try_from(id).unwrap();
    let steps = |operations: &[Operation]| -> Vec<Step> {
        operations.iter().map(|operation| Step::new(Target::Host, operation.clone())).collect()
    };
    let join = Operation::Join { link: port.clone(), bridge: bridge.clone() };
    let add = Operation::AddVlans { link: port.clone(), vlans: vlan(10).into(), tagging: Tagging::Untagged };
    let delete = Operation::DeleteVlan { port: port.clone(), vlan: vlan(1) };
    let up = Operation::Up { link: port.clone(), master: Some(bridge.clone()) };
    let hairpin = Operation::Hairpin { port };
    let apart = steps(&[join.clone(), add, delete, up.clone(), hairpin.clone()]);
    assert_eq!((session.batch_end(&apart, 0), session.batch_end(&apart, 3)), (3, 5));
    // Where nobody is kept apart, all is done at once.
    let plain = steps(&[join.clone(), up.clone(), hairpin]);
    assert_eq!(session.batch_end(&plain, 0), 3);
    let filters = steps(&[Operation::FilterVlans { bridge }, join, up]);
    assert_eq!(session.batch_end(&filters, 0), 2);
}
