//! Names of owners, each kept once.

use std::collections::HashMap;
use std::sync::Arc;

/// Names by small numbers, while an address counts on them.
#[derive(Debug, Default)]
pub(super) struct Owners {
    numbers: HashMap<Arc<str>, u32>,
    names: Vec<Option<(Arc<str>, u32)>>,
    unused: Vec<u32>,
}

impl Owners {
    /// Stands for no owner.
    pub(super) const NOBODY: u32 = u32::MAX;

    /// The number of a name, which counts once more.
    pub(super) fn intern(&mut self, name: &str) -> u32 {
        if let Some(&number) = self.numbers.get(name)
            && let Some((_, count)) = &mut self.names[number as usize]
        {
            *count += 1;
            return number;
        }
        let name: Arc<str> = name.into();
        let entry = Some((name.clone(), 1));
        let number = match self.unused.pop() {
            Some(number) => {
                self.names[number as usize] = entry;
                number
            }
            None => {
                self.names.push(entry);
                self.names.len() as u32 - 1
            }
        };
        self.numbers.insert(name, number);
        number
    }

    /// Counts a name once less.
    pub(super) fn release(&mut self, number: u32) {
        let Some(entry) = self.names.get_mut(number as usize) else { return };
        if let Some((name, count)) = entry {
            *count -= 1;
            if *count == 0 {
                self.numbers.remove(name);
                *entry = None;
                self.unused.push(number);
            }
        }
    }

    pub(super) fn name(&self, number: u32) -> &str {
        self.names.get(number as usize).and_then(|entry| entry.as_ref()).map_or("", |(name, _)| name)
    }
}
