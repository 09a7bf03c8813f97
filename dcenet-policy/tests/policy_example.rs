//! The example `policy`, verb by verb.

#![cfg(feature = "bundle")]

#[path = "../examples/policy/cli.rs"]
mod cli;

use serde_json::Value;

const PODS: &str = r#"
{ apiVersion: v1, kind: Namespace, metadata: { name: shop } }
---
{ apiVersion: v1, kind: Pod, metadata: { name: db, namespace: shop, labels: { app: db } }, spec: { nodeName: n1 }, status: { podIP: 10.0.0.1, hostIP: 192.0.2.1 } }
---
{ apiVersion: v1, kind: Pod, metadata: { name: web, namespace: shop, labels: { app: web } }, status: { podIP: 10.0.0.2 } }
"#;

fn policy(ingress: &str) -> String {
    format!(
        "---\n{{ apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {{ name: db, namespace: shop }}, \
         spec: {{ podSelector: {{ matchLabels: {{ app: db }} }}, ingress: [ {ingress} ] }} }}\n"
    )
}

/// Exit status, stdout and stderr of a verb, with `@1` and so on for files of these texts.
fn run(arguments: &[&str], texts: &[&str]) -> (u8, String, String) {
    let directory = tempfile::tempdir().unwrap();
    let mut words = vec!["policy".to_owned()];
    for argument in arguments {
        let file = argument.strip_prefix('@').map(|number| directory.path().join(number).with_extension("yaml"));
        words.push(file.map_or_else(|| (*argument).to_owned(), |file| file.display().to_string()));
    }
    for (number, text) in (1..).zip(texts) {
        std::fs::write(directory.path().join(format!("{number}.yaml")), format!("{PODS}{text}")).unwrap();
    }
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = cli::run(words.into_iter().map(Into::into), &mut out, &mut err);
    let text = |bytes| String::from_utf8(bytes).unwrap().replace(&format!("{}/", directory.path().display()), "");
    (status, text(out), text(err))
}

#[test]
fn each_verb_answers_with_its_status() {
    let open = policy("{ from: [ { podSelector: { matchLabels: { app: web } } } ], ports: [ { port: 5432 } ] }");
    let (status, out, _) = run(&["analyse", "--resources", "@1"], &[&open]);
    assert_eq!((status, out.as_str()), (0, ""));
    let (status, out, _) = run(&["analyse", "--resources", "@1"], &[&policy("{}")]);
    assert_eq!(status, 3);
    assert!(out.starts_with("too wide: shop/db ingress[0]: everything for everybody"), "{out}");

    let shut = policy("");
    let (status, out, _) = run(&["diff", "--before", "@1", "--after", "@2", "-o", "json"], &[&open, &shut]);
    let told: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((status, &told["version"], told["changes"].as_array().unwrap().len()), (3, &1.into(), 1));
    assert_eq!(
        (&told["changes"][0]["example"]["peer"], &told["changes"][0]["example"]["port"]),
        (&"10.0.0.2".into(), &5432.into())
    );
    assert_eq!(run(&["diff", "--before", "@1", "--after", "@2"], &[&open, &open]).0, 0);

    // A rule for one minute of the week is told of whatever the clock says.
    let late = format!(
        "{open}---\n{{ apiVersion: dcenet.io/v1alpha1, kind: Schedule, metadata: {{ name: late }}, \
         spec: {{ windows: [ {{ days: [ sun ], from: \"23:59\", until: \"24:00\" }} ] }} }}\n\
         ---\n{{ apiVersion: dcenet.io/v1alpha1, kind: Policy, metadata: {{ name: late, namespace: shop }}, \
         spec: {{ ingress: [ {{ action: allow, schedule: late }} ] }} }}\n"
    );
    let (status, out, _) = run(&["diff", "--before", "@1", "--after", "@2"], &[&open, &late]);
    assert!(status == 3 && out.contains("scheduled: shop/policy/late ingress[0]: late "), "{out}");
    assert_eq!(run(&["diff", "--before", "@1", "--after", "@2"], &[&late, &late]).0, 0);
    assert_eq!(run(&["analyse", "--resources", "@1"], &[&late]).0, 3);

    let (status, out, _) = run(&["who", "--resources", "@1", "--pod", "shop/db"], &[&open]);
    assert_eq!(status, 0);
    assert_eq!(out, "shop/db (10.0.0.1) from shop/web: tcp 5432\nshop/db (10.0.0.1) from node n1: everything\n");
    let (status, out, _) = run(&["who", "--resources", "@1", "--pod", "shop/web", "--from", "-o", "json"], &[&open]);
    let told: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((status, &told["pod"], &told["way"]), (0, &"shop/web".into(), &"from".into()));

    let (status, out, err) = run(&["render", "--resources", "@1", "--for", "kubernetes"], &[&open]);
    assert_eq!((status, err.as_str()), (0, ""));
    let object: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(object["spec"]["ingress"][0]["ports"][0]["port"], 5432);
    let (status, out, err) = run(&["render", "--resources", "@1", "--for", "nftables", "--node", "n1"], &[&open]);
    assert_eq!(status, 3);
    assert!(
        out.contains("table inet dcenet_policy {") && err.contains("policy: not as written: everything: "),
        "{out}{err}"
    );

    let (status, out, _) = run(&["matrix", "--resources", "@1", "--probe", "tcp/80"], &[&open]);
    assert_eq!((status, out.as_str()), (0, "== tcp/80 ipv4\n           1 2\n1 shop/db  . .\n2 shop/web X .\n"));
    assert!(run(&["matrix", "--resources", "@1", "--probe", "icmp", "-o", "svg"], &[&open]).1.starts_with("<svg "));
}

#[test]
fn bad_input_and_usage_have_a_status_of_their_own() {
    let refusal = |arguments: &[&str]| {
        let (status, out, err) = run(arguments, &[""]);
        assert_eq!((status, out.as_str()), (2, ""), "{err}");
        err
    };
    assert_eq!(
        refusal(&["who", "--resources", "@1", "--pod", "shop/no"]),
        "policy: pod shop/no is not in the cluster; add it before asking\n"
    );
    assert_eq!(refusal(&["who", "--resources", "@1", "--pod", "db"]), "policy: --pod db: write NAMESPACE/NAME\n");
    assert!(refusal(&["analyse", "--resources", "@7"]).starts_with("policy: 7.yaml: "));
    assert!(refusal(&["render", "--resources", "@1", "--for", "kubernetes", "--node", "n"]).contains("remove it"));
    assert!(refusal(&["explode"]).contains("explode"));
}

/// RFC 8032, section 7.1, test 1.
const KEY: &str = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g\n\
    -----END PRIVATE KEY-----\n";
const PUBLIC: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=\n\
    -----END PUBLIC KEY-----\n";

#[test]
fn a_bundle_is_signed_and_verified() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let (key, public) = (file("key.pem", KEY), file("public.pem", PUBLIC));
    file("set/shop/db.yaml", &policy(""));
    file("set/pods.yaml", PODS);
    let set = directory.path().join("set").display().to_string();
    let sign = ["sign", "--resources", &set, "--name", "production", "--generation", "7", "--key", &key];
    let (status, envelope, err) = run(&sign, &[]);
    assert_eq!((status, err.as_str()), (0, ""));
    let bundle = file("production.bundle", &envelope);

    let (status, out, err) = run(&["verify", &bundle, "--trust", &public, "-o", "json"], &[]);
    assert_eq!((status, err.as_str()), (0, ""));
    let told: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&told["name"], &told["generation"]), (&"production".into(), &7.into()));
    assert_eq!(told["documents"], serde_json::json!(["pods.yaml", "shop/db.yaml"]));
    assert_eq!(told["signers"].as_array().unwrap().len(), 1);
    let (status, out, _) = run(&["verify", &bundle, "--trust", &public], &[]);
    assert!(status == 0 && out.starts_with("production generation 7, sha256:"), "{out}");

    let changed = file("changed.bundle", &envelope.replacen("\"sig\":\"", "\"sig\":\"A", 1).replacen("==\"", "=\"", 1));
    let (status, _, err) = run(&["verify", &changed, "--trust", &public], &[]);
    assert!(status == 2 && err.contains("changed.bundle: "), "{err}");
    let (status, _, err) = run(&["verify", &bundle, "--trust", &public, "--threshold", "2"], &[]);
    assert!(status == 2 && err.contains("threshold: 2 of 1 keys"), "{err}");
    file(
        "set/wrong.yaml",
        "kind: NetworkPolicy\napiVersion: networking.k8s.io/v1\nmetadata: { name: a }\nspec: { x: 1 }\n",
    );
    let (status, out, err) = run(&sign, &[]);
    assert_eq!((status, out.as_str()), (2, ""), "{err}");
    assert!(err.contains("wrong.yaml"), "{err}");
}
