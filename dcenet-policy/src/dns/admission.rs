//! How many may ask at a time.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;

pub(super) struct Admission {
    most: usize,
    most_of_client: usize,
    now: Mutex<Now>,
}

#[derive(Default)]
struct Now {
    all: usize,
    of_client: HashMap<IpAddr, usize>,
}

/// A place, until it is dropped.
pub(super) struct Admitted {
    admission: Arc<Admission>,
    client: IpAddr,
}

impl Admission {
    pub(super) fn new(most: usize, most_of_client: usize) -> Arc<Self> {
        Arc::new(Self { most, most_of_client, now: Mutex::default() })
    }

    /// A place for a client, if there is one.
    pub(super) fn admit(self: &Arc<Self>, client: IpAddr) -> Option<Admitted> {
        let mut now = self.now.lock();
        let of_client = now.of_client.get(&client).copied().unwrap_or(0);
        if now.all >= self.most || of_client >= self.most_of_client {
            return None;
        }
        now.all += 1;
        now.of_client.insert(client, of_client + 1);
        Some(Admitted { admission: Arc::clone(self), client })
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut now = self.admission.now.lock();
        now.all -= 1;
        let left = now.of_client.get(&self.client).map_or(0, |count| count - 1);
        if left == 0 {
            now.of_client.remove(&self.client);
        } else {
            now.of_client.insert(self.client, left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_given_back_and_counted_by_client() {
        let admission = Admission::new(3, 2);
        let [one, other]: [IpAddr; 2] = [[10, 0, 0, 1].into(), [10, 0, 0, 2].into()];
        let first = admission.admit(one).unwrap();
        let _second = admission.admit(one).unwrap();
        assert!(admission.admit(one).is_none(), "one client has two");
        let third = admission.admit(other).unwrap();
        assert!(admission.admit(other).is_none(), "there are three");
        drop((first, third));
        assert!(admission.admit(one).is_some());
        assert_eq!(admission.now.lock().of_client.len(), 1, "who has none is forgotten");
    }
}
