//! Network policy: model, reference evaluator and compiler.
//!
//! ```text
//! sources -> model -> flatten -> ir -> verify -> opt -> diagram -> target
//!              |                                          |
//!              +-> eval (the oracle) -> explain           +-> walked by tests
//! ```
//!
//! - [`sources`] read policies from text; [`model`] is what they mean, together with the cluster they apply to.
//! - [`eval`] answers one question slowly and straight from the model; [`explain`] puts the answer into words.
//! - [`Compiler`] turns the same model into tables and decision diagrams: an address becomes a class
//!   ([`classes`]), a class becomes a small local id, and a [`diagram`] over local id, protocol and port ends in a
//!   verdict with the rule that decided.
//! - [`target`] turns diagrams into eBPF programs.
//! - `bundle` (feature) makes a set of policies one object that is numbered and signed.
//! - [`analysis`] finds rules that do nothing or too much, and tells what changes between two sets of policies.
//! - [`render`] writes policies down for enforcers of others, and what these cannot do.
//! - [`reach`] asks who reaches whom in a cluster, evaluator or whole programs; the example of that name reads the cluster
//!   from a directory of Kubernetes objects: `cargo run -p dcenet-policy --example reach -- --help`.
//!
//! But for the owner of a node's policy state (`enforcer`), the DNS proxy that tells it of answers (`dns`), and the note of bundles that
//! were taken, nothing here does I/O or reads a clock.
//!
//! # Examples
//!
//! ```
//! # #[cfg(feature = "yaml")] {
//! use dcenet_policy::model::{Cluster, Pod, PodId, Protocol, Tuple, Verdict};
//! use dcenet_policy::{Compiler, eval, sources};
//!
//! let mut cluster = Cluster::default();
//! cluster.insert_namespace("shop", []);
//! let (web, db) = (PodId::new("shop", "web"), PodId::new("shop", "db"));
//! cluster.pods.insert(web.clone(), Pod::new([("app", "web")], ["10.0.0.1".parse().unwrap()]));
//! cluster.pods.insert(db.clone(), Pod::new([("app", "db")], ["10.0.0.2".parse().unwrap()]));
//! for policy in sources::networkpolicy::from_yaml(
//!     r#"
//! apiVersion: networking.k8s.io/v1
//! kind: NetworkPolicy
//! metadata: { name: db, namespace: shop }
//! spec:
//!   podSelector: { matchLabels: { app: db } }
//!   ingress:
//!   - from: [ { podSelector: { matchLabels: { app: web } } } ]
//!     ports: [ { port: 5432 } ]
//! "#,
//! )
//! .unwrap()
//! {
//!     cluster.insert_policy(policy);
//! }
//!
//! let question = Tuple::ingress("10.0.0.1".parse().unwrap(), Protocol::TCP, 5432);
//! let answer = eval::evaluate(&cluster, &db, &question).unwrap();
//! assert_eq!(answer.verdict, Verdict::Allow);
//! assert_eq!(answer.to_string(), "allow: shop/db ingress[0] from[0] ports[0]");
//!
//! let mut compiler = Compiler::default();
//! let update = compiler.update(&cluster).unwrap();
//! let leaf = update.decide(&db, &question).unwrap();
//! assert_eq!(leaf.verdict, Verdict::Allow);
//! assert_eq!(update.rules.name(leaf.rule), "shop/db ingress[0] from[0] ports[0]");
//! # }
//! ```

// A library neither prints nor panics on its caller's input.
#![warn(unreachable_pub, clippy::print_stderr, clippy::print_stdout, clippy::unwrap_used)]
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod analysis;
#[cfg(feature = "bundle")]
pub mod bundle;
pub mod classes;
pub mod compiler;
pub mod diagram;
#[cfg(feature = "dns")]
pub mod dns;
pub mod enforcer;
pub mod eval;
pub mod explain;
mod flatten;
mod ids;
pub mod ir;
pub mod isolation;
pub mod model;
pub mod opt;
mod partition;
pub mod reach;
pub mod render;
pub mod sources;
pub mod target;
#[cfg(feature = "test-support")]
pub mod test_support;
pub mod verify;

pub use crate::compiler::{CompileError, Compiler, Update};
