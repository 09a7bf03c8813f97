//! Whatever is in a record's file: it is refused with its line, or read, and what was read survives being read again.

#![no_main]

use dcenet_core::test_support::read_hostile_record;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(Some(record)) = read_hostile_record(text) {
        let line = format!("{}\n", serde_json::json!({ "intent": record }));
        let again = read_hostile_record(&line).expect("what was read can be written").expect("a record");
        assert_eq!(again.key, record.key);
        assert_eq!(again.undo, record.undo);
    }
});
