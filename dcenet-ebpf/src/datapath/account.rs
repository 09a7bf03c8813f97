//! Counters, events, and the ends of the program.

use super::emitter::{Emitter, SKB_IFINDEX, SKB_LEN, TC_ACT_SHOT, TC_ACT_UNSPEC};
use super::{Judgement, Slot, frame};
use crate::abi::{self, Direction, Endpoint, Event, EventKind, EventLimit, FlowKey, Reason, reason_index};
use crate::asm::Label;
use crate::insn::{Cond, Helper, Reg::*, Size};

impl Emitter<'_> {
    pub(super) fn count_reason(&mut self, reason: Reason) {
        self.asm.mov(R1, reason_index(reason, self.direction).cast_signed());
        self.count(abi::REASONS, R1);
    }

    /// Writes the event's counters for a packet without a flow. Uses `R1`.
    pub(super) fn packet_counters(&mut self) {
        let (own, other) = match self.direction {
            Direction::Egress => (Event::EGRESS_PACKETS, Event::INGRESS_PACKETS),
            Direction::Ingress => (Event::INGRESS_PACKETS, Event::EGRESS_PACKETS),
        };
        let event = frame::EVENT;
        self.asm
            .store(Size::Dw, R10, event + own, 1)
            .load(Size::W, R1, R6, SKB_LEN)
            .store(Size::Dw, R10, event + own + 8, R1)
            .store(Size::Dw, R10, event + other, 0)
            .store(Size::Dw, R10, event + other + 8, 0);
    }

    /// Sends the event whose counters, time, reason and rule are set, and ends the program.
    pub(super) fn send_event(&mut self, kind: EventKind) {
        let event_place = self.event_place();
        self.asm.store(Size::W, R10, frame::EVENT_KIND, kind as i32).jump(event_place);
    }

    /// The ends of the program that were asked for.
    pub(super) fn ends(&mut self) {
        for (reason, label) in self.take_passes() {
            self.asm.bind(label);
            // What a guard judges again was counted at the pod's own device.
            if self.slot != Slot::Guarded {
                self.count_reason(reason);
            }
            self.asm.ret(TC_ACT_UNSPEC);
        }
        let drops = self.take_drops();
        let [with_event, count] = self.labels();
        let mut any_event = false;
        for (reason, label) in drops {
            self.asm.bind(label).store(Size::W, R10, frame::REASON, reason as i32);
            // Without an endpoint there is nobody to tell of, and what is for others says nothing of this one.
            if matches!(reason, Reason::UnknownEndpoint | Reason::OtherHost) || !self.enforces() {
                self.asm.jump(count);
            } else {
                any_event = true;
                if !matches!(reason, Reason::Denied | Reason::Revoked | Reason::ConntrackFull) {
                    self.asm.store(Size::W, R10, frame::RULE, Event::NO_RULE.cast_signed());
                }
                self.asm.jump(with_event);
            }
        }
        self.asm.bind(count);
        self.count_drop();
        self.asm.ret(TC_ACT_SHOT);
        if any_event {
            self.asm.bind(with_event);
            self.count_drop();
            self.denied();
        }
        if let Some(event) = self.take_event_place() {
            self.asm.bind(event);
            self.event();
        }
    }

    fn count_drop(&mut self) {
        self.asm.load(Size::W, R1, R10, frame::REASON).lsh(R1, 1).add(R1, self.direction as i32);
        self.count(abi::REASONS, R1);
    }

    /// A drop is told of as long as the endpoint's limit allows it.
    fn denied(&mut self) {
        let Judgement::Classifiers { denied_events, .. } = self.judgement else { return };
        let silent = self.told_place();
        self.asm.call(Helper::KtimeGetCoarseNs).store(Size::Dw, R10, frame::NOW, R0);
        self.within_limit(EventLimit::USED, denied_events, silent);
        self.packet_counters();
        self.send_event(EventKind::Denied);
        self.asm.bind(silent);
        self.answer();
        self.asm.ret(TC_ACT_SHOT);
    }

    /// Counts an event at [`frame::NOW`] among those of its window, at an offset of [`EventLimit`]; one beyond the limit
    /// is counted as held back and goes to `silent`. Uses `R8`.
    fn within_limit(&mut self, used: i16, limit: u32, silent: Label) {
        let within = self.asm.label();
        self.count_in_window(used, limit, silent, within);
        self.count_atomic(R0, EventLimit::LIMITED);
        self.asm.jump(silent).bind(within).add(R1, 1).store(Size::W, R0, used, R1);
    }

    /// Goes to `within` as long as the limit of the window allows it, with the limits in `R0` and what was used in `R1`; else on,
    /// with the limits in `R0`. Uses `R8`.
    pub(super) fn count_in_window(&mut self, used: i16, limit: u32, nobody: Label, within: Label) {
        let same = self.asm.label();
        self.asm.load(Size::Dw, R8, R10, frame::NOW).rsh(R8, WINDOW_BITS).load(Size::H, R1, R10, frame::SLOT);
        self.lookup_index(abi::EVENT_LIMITS, R1);
        self.asm
            .jump_if(Cond::Eq, R0, 0, nobody)
            .load(Size::Dw, R2, R0, EventLimit::WINDOW)
            .jump_if(Cond::Eq, R2, R8, same)
            .store(Size::Dw, R0, EventLimit::WINDOW, R8)
            .store(Size::W, R0, EventLimit::USED, 0)
            .store(Size::W, R0, EventLimit::USED_BY_FLOWS, 0)
            .store(Size::W, R0, EventLimit::ANSWERS, 0)
            .bind(same)
            .load(Size::W, R1, R0, used)
            .jump_if(Cond::Lt, R1, i32::try_from(limit).unwrap_or(i32::MAX), within);
    }

    /// Fills in the event and sends it; the verdict follows from its kind.
    fn event(&mut self) {
        let Judgement::Classifiers { flow_events, .. } = self.judgement else { return };
        let event = frame::EVENT;
        let told = self.told_place();
        let [v4, v6, named, sent, within] = self.labels();
        // Those about drops have been asked already.
        self.asm.load(Size::W, R1, R10, frame::EVENT_KIND).jump_if(Cond::Eq, R1, EventKind::Denied as i32, within);
        self.within_limit(EventLimit::USED_BY_FLOWS, flow_events, sent);
        self.asm.bind(within);
        let copies: [(Size, i16, i16); 10] = [
            (Size::Dw, frame::NOW, Event::TIME),
            (Size::W, frame::EVENT_KIND, Event::KIND),
            (Size::W, frame::REASON, Event::REASON),
            (Size::B, frame::PROTOCOL, Event::PROTOCOL),
            (Size::H, frame::SLOT, Event::SLOT),
            (Size::B, frame::VERSION, Event::VERSION),
            (Size::W, frame::TCP_FLAGS, Event::TCP_FLAGS),
            (Size::W, frame::RULE, Event::RULE),
            (Size::W, frame::PORTS, Event::POD_PORT),
            (Size::W, frame::ICMP, Event::ICMP),
        ];
        for (size, from, to) in copies {
            let stored = match to {
                Event::KIND | Event::REASON | Event::TCP_FLAGS => Size::B,
                Event::ICMP => Size::H,
                _ => size,
            };
            self.asm.load(size, R1, R10, from).store(stored, R10, event + to, R1);
        }
        self.copy_address((R10, frame::PEER), event + Event::PEER);
        self.asm
            .store(Size::B, R10, event + Event::DIRECTION, self.direction as i32)
            .store(Size::H, R10, event + Event::ICMP + 2, 0)
            .load(Size::W, R1, R6, SKB_IFINDEX)
            .store(Size::W, R10, event + Event::IFINDEX, R1)
            .store(Size::Dw, R10, event + Event::POD, 0)
            .store(Size::Dw, R10, event + Event::POD + 8, 0)
            .load(Size::B, R1, R10, frame::VERSION)
            .and(R1, !i32::from(FlowKey::ASKED_BY_PEER))
            .jump_if(Cond::Eq, R1, 4, v4)
            .jump_if(Cond::Eq, R1, 6, v6)
            .jump(named)
            .bind(v4)
            .store(Size::H, R10, event + Event::POD + 10, -1)
            .load(Size::W, R1, R9, Endpoint::IPV4)
            .store(Size::W, R10, event + Event::POD + 12, R1)
            .jump(named)
            .bind(v6);
        self.copy_address((R9, Endpoint::IPV6), event + Event::POD);
        self.asm
            .bind(named)
            .load_map(R1, abi::EVENTS)
            .mov(R2, R10)
            .add(R2, i32::from(event))
            .mov(R3, Event::BYTES as i32)
            // Wakes the reader only where it has caught up.
            .mov(R4, 0)
            .call(Helper::RingbufOutput)
            .jump_if(Cond::Eq, R0, 0, sent)
            .load(Size::H, R1, R10, frame::SLOT);
        self.lookup_index(abi::EVENT_LIMITS, R1);
        self.asm.jump_if(Cond::Eq, R0, 0, sent);
        self.count_atomic(R0, EventLimit::LOST);
        self.asm
            .bind(sent)
            .load(Size::W, R1, R10, frame::EVENT_KIND)
            .jump_if(Cond::Eq, R1, EventKind::Denied as i32, told)
            .ret(TC_ACT_UNSPEC);
    }

    /// Where packets go that are dropped and were told of, or were too many for that.
    fn told_place(&mut self) -> Label {
        *self.told.get_or_insert_with(|| self.asm.label())
    }

    fn event_place(&mut self) -> Label {
        *self.event.get_or_insert_with(|| self.asm.label())
    }

    fn take_event_place(&mut self) -> Option<Label> {
        self.event.take()
    }
}

/// A window of the limit is 2^30 ns.
const WINDOW_BITS: i32 = 30;
