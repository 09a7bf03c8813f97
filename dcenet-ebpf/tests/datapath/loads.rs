//! The verifier accepts the programs, and within a budget.

use dcenet_core::test_support::{Rung, effort, require};
use dcenet_ebpf::datapath::{self, AllowAll, DenyAll, EmitClassifier, FROM_POD, TO_POD};

use crate::harness::*;

#[test]
fn every_combination_of_trivial_classifiers_loads_within_its_budget() {
    if !require(Rung::Kernel) {
        return;
    }
    let (allow, deny) = (AllowAll { rule: 1 }, DenyAll { rule: 2 });
    let kinds: [&dyn EmitClassifier; 2] = [&allow, &deny];
    for egress in kinds {
        for ingress in kinds {
            let pod = Pod::new(egress, ingress);
            for direction in [Egress, Ingress] {
                let verified = pod.program(direction).info().verified_instructions;
                let slots = pod.program(direction).info().translated_bytes / 8;
                eprintln!("{direction:?}: {verified} instructions verified, {slots} slots after rewriting");
                // About 13,700 on 6.18, and 2,800 of the default. How much is looked at again is a matter of the kernel.
                let budget = effort(100_000, 20_500, 20_500);
                assert!(verified < budget, "{direction:?}: {verified} instructions verified");
            }
        }
    }
    let default = Pod::load(&datapath::default_program(&small()).unwrap(), &[]);
    for direction in [Egress, Ingress] {
        let verified = default.program(direction).info().verified_instructions;
        eprintln!("{direction:?}: {verified} instructions of the default program verified");
        let budget = effort(50_000, 4_200, 4_200);
        assert!(verified < budget, "{direction:?}: {verified} instructions of the default program verified");
    }
}

#[test]
fn nothing_is_unreachable_and_the_stack_is_small() {
    let (allow, deny) = (AllowAll { rule: 1 }, DenyAll { rule: 2 });
    let sizes = small();
    let mut objects = vec![datapath::default_program(&sizes).unwrap()];
    let kinds: [&dyn EmitClassifier; 2] = [&allow, &deny];
    for egress in kinds {
        for ingress in kinds {
            objects.push(datapath::program(&datapath::Spec::new(&sizes, egress, ingress)).unwrap());
        }
    }
    for object in objects {
        assert_eq!(object.functions().iter().map(|f| f.name()).collect::<Vec<_>>(), [FROM_POD, TO_POD]);
        for function in object.functions() {
            let lint = function.lint();
            assert_eq!(lint.unreachable, [], "{}", function.name());
            assert_eq!(lint.unset_reads, [], "{}", function.name());
            assert!(lint.stack_bytes <= 256, "{} bytes of stack", lint.stack_bytes);
        }
    }
}
