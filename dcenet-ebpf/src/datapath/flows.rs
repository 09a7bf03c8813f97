//! Connection tracking: find the flow, believe it while its policy is that of now, make new ones.

use std::num::NonZeroU32;

use super::emitter::{Emitter, SKB_LEN, TC_ACT_UNSPEC, TCP, UDP};
use super::frame;
use super::{Judgement, Timeouts};
use crate::abi::{self, Direction, Endpoint, Event, EventKind, Flow, FlowState, Reason};
use crate::asm::Label;
use crate::insn::{Cond, Helper, Reg, Reg::*, Size, SwapWidth};

impl Emitter<'_> {
    /// Finds the flow of the key and passes its packet; all else goes to the judge.
    ///
    /// `R7` is the flow, `R8` the time, `R1` the direction that admitted the flow.
    pub(super) fn flow(&mut self, timeouts: &Timeouts, sample: Option<NonZeroU32>) {
        let [begun, found, over, miss, stale, hit, special, advance] = self.labels();
        self.settled_flow(sample, found, begun);
        self.asm.bind(self.places.lookup);
        self.lookup(abi::CONNTRACK, frame::KEY);
        self.asm
            .jump_if(Cond::Eq, R0, 0, begun)
            .bind(found)
            .mov(R7, R0)
            .call(Helper::KtimeGetCoarseNs)
            .mov(R8, R0)
            .load(Size::Dw, R1, R7, Flow::LAST_SEEN)
            .sub(R0, R1)
            .load(Size::Dw, R1, R7, Flow::TIMEOUT)
            // Signed: another CPU may have seen a later tick.
            .jump_if(Cond::Sgt, R0, R1, over)
            .load(Size::B, R1, R7, Flow::DIRECTION);
        self.opens_anew(over);
        self.generation(R1, R3);
        self.asm
            .load(Size::W, R2, R7, Flow::GENERATION)
            .jump_if(Cond::Ne, R2, R3, stale)
            .bind(hit)
            .load(Size::W, R2, R10, frame::FLAGS)
            .jump_if(Cond::Set, R2, frame::RELATED | frame::BEGUN, special)
            .bind(advance);
        self.advance(timeouts, sample);

        let related = self.pass(Reason::Related);
        self.asm
            .bind(special)
            .jump_if(Cond::Set, R2, frame::RELATED, related)
            // What it acknowledges was written over.
            .jump_if(Cond::Set, R2, frame::STALE, advance);
        self.settle(advance);

        self.asm.bind(begun);
        self.lookup(abi::CONNTRACK_NEW, frame::KEY);
        let moved = self.asm.label();
        self.asm.jump_if(Cond::Eq, R0, 0, moved);
        self.set_flags(frame::BEGUN);
        self.asm.jump(found);
        // Another CPU may have moved it between the two looks; but not what only begins.
        self.asm.bind(moved).load(Size::W, R1, R10, frame::TCP_FLAGS).and(R1, SYN | ACK).jump_if(
            Cond::Eq,
            R1,
            SYN,
            miss,
        );
        self.lookup(abi::CONNTRACK, frame::KEY);
        self.asm.jump_if(Cond::Ne, R0, 0, found).jump(miss);

        self.asm.bind(stale).store(Size::W, R10, frame::GENERATION, R3).store(Size::W, R10, frame::JUDGE, R1).store(
            Size::Dw,
            R10,
            frame::NOW,
            R8,
        );
        self.set_flags(frame::STALE);
        let classify = self.asm.label();
        self.asm.jump(classify);

        self.asm.bind(over);
        self.set_flags(frame::REPLACES);
        self.asm.bind(miss);
        let not_related = self.asm.label();
        self.asm.load(Size::W, R1, R10, frame::FLAGS).and(R1, frame::RELATED).jump_if(Cond::Eq, R1, 0, not_related);
        self.unrelated();
        self.asm
            .bind(not_related)
            .bind(self.places.judge_packet)
            .load(Size::W, R1, R9, generation_offset(self.direction))
            .store(Size::W, R10, frame::GENERATION, R1)
            .store(Size::W, R10, frame::JUDGE, self.direction as i32)
            .bind(classify);
        self.judge(|emitter| emitter.allow(timeouts, hit));
    }

    /// The fast path of settled flows: admitted by the policy of now, seen in this tick before, without a change of state. Of
    /// all other packets the rest of the stack is cleared, and they go on to `found` or `begun` as if they had been looked
    /// up there.
    fn settled_flow(&mut self, sample: Option<NonZeroU32>, found: Label, begun: Label) {
        let [other, unsettled] = self.labels();
        self.asm.bind(self.places.common).call(Helper::Jiffies64).mov(R8, R0);
        self.lookup(abi::CONNTRACK, frame::KEY);
        self.asm
            .jump_if(Cond::Eq, R0, 0, unsettled)
            // While the tick lasts the coarse clock stands still, and a time that is up has been longer than that.
            .load(Size::Dw, R1, R0, Flow::TICK)
            .jump_if(Cond::Ne, R1, R8, other)
            .load(Size::B, R1, R0, Flow::DIRECTION);
        self.generation(R1, R3);
        self.asm
            .load(Size::W, R2, R0, Flow::GENERATION)
            .jump_if(Cond::Ne, R2, R3, other)
            .load(Size::B, R2, R0, Flow::STATE)
            .jump_if(Cond::Ne, R2, FlowState::Established as i32, other)
            .load(Size::W, R2, R10, frame::TCP_FLAGS)
            .jump_if(Cond::Set, R2, FIN | SYN | RST, other);
        let (packets, bytes) = counters(self.direction);
        self.add_packet(R0, packets, bytes);
        if let Some(one_in) = sample {
            self.asm.mov(R7, R0).load(Size::Dw, R8, R7, Flow::LAST_SEEN);
            self.clear_marks();
            self.sample(one_in);
        }
        self.asm.ret(TC_ACT_UNSPEC).bind(other);
        self.clear_rest();
        self.asm.jump(found).bind(unsettled);
        self.clear_rest();
        self.asm.jump(begun);
    }

    /// Moves a flow of [`abi::CONNTRACK_NEW`] to [`abi::CONNTRACK`] once its opening side goes on after an answer, and for
    /// TCP by what it acknowledges proves that it saw the answer: who sends under false addresses has seen none. Other
    /// protocols have no proof; some answers must have been given.
    ///
    /// `R7` is the flow, `R1` the direction that admitted it; so they are at `then`, the flow moved or not.
    fn settle(&mut self, then: Label) {
        let [tcp, proven, as_it_was] = self.labels();
        let (answers, _) = counters(self.direction.opposite());
        self.asm
            .jump_if(Cond::Ne, R1, self.direction as i32, then)
            .load(Size::B, R2, R7, Flow::STATE)
            .jump_if(Cond::Ne, R2, FlowState::Established as i32, then)
            .load(Size::Dw, R2, R7, answers)
            .load(Size::B, R3, R10, frame::PROTOCOL)
            .jump_if(Cond::Eq, R3, TCP, tcp)
            .jump_if(Cond::Lt, R2, ANSWERS_WITHOUT_PROOF, then)
            .jump(proven)
            .bind(tcp)
            .jump_if(Cond::Eq, R2, 0, then)
            .load(Size::W, R3, R10, frame::TCP_FLAGS)
            .and(R3, SYN | ACK)
            .jump_if(Cond::Ne, R3, ACK, then)
            .load(Size::W, R2, R7, Flow::EXPECTED)
            // Met in mid-flow. One that does not exist is answered by a RST, which ends it.
            .jump_if(Cond::Eq, R2, 0, proven)
            .load(Size::W, R3, R10, frame::ACKNOWLEDGED)
            .be(SwapWidth::W32, R3)
            .sub(R3, R2)
            .lsh(R3, 32)
            .rsh(R3, 32)
            .jump_if(Cond::Ge, R3, FIRST_WINDOW, then)
            .bind(proven);
        for word in (0..Flow::BYTES as i16).step_by(8) {
            self.asm.load(Size::Dw, R2, R7, word).store(Size::Dw, R10, frame::FLOW + word, R2);
        }
        self.update(abi::CONNTRACK, frame::KEY, frame::FLOW);
        self.asm.jump_if(Cond::Ne, R0, 0, as_it_was);
        self.lookup(abi::CONNTRACK, frame::KEY);
        let open = self.asm.label();
        self.asm
            .jump_if(Cond::Eq, R0, 0, as_it_was)
            // The other direction may have closed it meanwhile.
            .load(Size::B, R2, R7, Flow::STATE)
            .jump_if(Cond::Ne, R2, FlowState::Closing as i32, open)
            .store(Size::B, R0, Flow::STATE, R2)
            .load(Size::Dw, R2, R7, Flow::TIMEOUT)
            .store(Size::Dw, R0, Flow::TIMEOUT, R2)
            .bind(open)
            .mov(R7, R0);
        self.forget(abi::CONNTRACK_NEW);
        self.asm.bind(as_it_was).load(Size::B, R1, R7, Flow::DIRECTION).jump(then);
    }

    /// Removes the key's entry, if there is one.
    fn forget(&mut self, map: &str) {
        self.asm.load_map(R1, map).mov(R2, R10).add(R2, i32::from(frame::KEY)).call(Helper::MapDeleteElem);
    }

    /// `R0 =` the key's flow, or null, where it is known that there was one.
    fn flow_again(&mut self) {
        let [settled, found] = self.labels();
        self.asm.load(Size::W, R1, R10, frame::FLAGS).and(R1, frame::BEGUN).jump_if(Cond::Eq, R1, 0, settled);
        self.lookup(abi::CONNTRACK_NEW, frame::KEY);
        self.asm.jump_if(Cond::Ne, R0, 0, found).bind(settled);
        self.lookup(abi::CONNTRACK, frame::KEY);
        self.asm.bind(found);
    }

    /// `to =` the endpoint's generation of the direction whose number is in `direction`.
    pub(super) fn generation(&mut self, direction: Reg, to: Reg) {
        let [ingress, known] = self.labels();
        self.asm
            .jump_if(Cond::Ne, direction, Direction::Egress as i32, ingress)
            .load(Size::W, to, R9, Endpoint::GENERATION_EGRESS)
            .jump(known)
            .bind(ingress)
            .load(Size::W, to, R9, Endpoint::GENERATION_INGRESS)
            .bind(known);
    }

    /// A lone SYN from the side that did not open the flow, or after the flow was closed, opens a flow of its own. `R1`
    /// is the direction that admitted the flow.
    pub(super) fn opens_anew(&mut self, miss: Label) {
        let [syn, no] = self.labels();
        self.asm
            .load(Size::W, R2, R10, frame::TCP_FLAGS)
            .and(R2, SYN | ACK)
            .jump_if(Cond::Eq, R2, SYN, syn)
            .jump(no)
            .bind(syn)
            .jump_if(Cond::Ne, R1, self.direction as i32, miss)
            .load(Size::B, R2, R7, Flow::STATE)
            .jump_if(Cond::Eq, R2, FlowState::Closing as i32, miss)
            .bind(no);
    }

    /// A packet of a known flow: state, time, counters, verdict.
    fn advance(&mut self, timeouts: &Timeouts, sample: Option<NonZeroU32>) {
        let own = self.direction as i32;
        let [not_tcp, closing, answered, refresh, datagram] = self.labels();
        self.asm
            .load(Size::B, R5, R7, Flow::STATE)
            .load(Size::B, R4, R10, frame::PROTOCOL)
            .jump_if(Cond::Ne, R4, TCP, not_tcp)
            .load(Size::W, R3, R10, frame::TCP_FLAGS)
            .jump_if(Cond::Set, R3, FIN | RST, closing)
            .jump_if(Cond::Eq, R1, own, refresh)
            .and(R3, SYN | ACK)
            .jump_if(Cond::Ne, R3, SYN | ACK, answered)
            // Each time: an earlier answer may have been to an opener that is gone.
            .load(Size::W, R2, R10, frame::SEQUENCE)
            .be(SwapWidth::W32, R2)
            .add(R2, 1)
            .store(Size::W, R7, Flow::EXPECTED, R2)
            .bind(answered)
            .jump_if(Cond::Ne, R5, FlowState::New as i32, refresh);
        self.state(FlowState::Established, timeouts.tcp_established_ns());
        self.asm
            .jump(refresh)
            .bind(not_tcp)
            .jump_if(Cond::Ne, R5, FlowState::New as i32, refresh)
            .jump_if(Cond::Eq, R1, own, refresh)
            .jump_if(Cond::Eq, R4, UDP, datagram);
        self.state(FlowState::Established, timeouts.other_ns());
        self.asm.jump(refresh).bind(datagram);
        self.state(FlowState::Established, timeouts.udp_established_ns());
        self.asm.bind(refresh);
        self.count_in_flow();
        self.note_head();
        if let Some(one_in) = sample {
            self.sample(one_in);
        }
        self.asm.ret(TC_ACT_UNSPEC);

        self.asm.bind(closing).jump_if(Cond::Eq, R5, FlowState::Closing as i32, refresh);
        self.state(FlowState::Closing, timeouts.tcp_closing_ns());
        self.count_in_flow();
        self.note_head();
        self.tell_flow(EventKind::Closed);
    }

    /// Goes on with all but one in so many packets, and tells of that one.
    fn sample(&mut self, one_in: NonZeroU32) {
        let other = self.asm.label();
        self.asm
            .call(Helper::GetPrandomU32)
            .lsh(R0, 32)
            .rsh(R0, 32)
            .load_imm64(R1, u64::from(u32::MAX / one_in))
            .jump_if(Cond::Gt, R0, R1, other);
        self.tell_flow(EventKind::Sampled);
        self.asm.bind(other);
    }

    /// Sends an event about a packet of the flow in `R7` at the time in `R8`, and ends the program.
    fn tell_flow(&mut self, kind: EventKind) {
        let counters = [
            (Flow::EGRESS_PACKETS, Event::EGRESS_PACKETS),
            (Flow::EGRESS_OCTETS, Event::EGRESS_OCTETS),
            (Flow::INGRESS_PACKETS, Event::INGRESS_PACKETS),
            (Flow::INGRESS_OCTETS, Event::INGRESS_OCTETS),
        ];
        for (from, to) in counters {
            self.asm.load(Size::Dw, R1, R7, from).store(Size::Dw, R10, frame::EVENT + to, R1);
        }
        self.asm
            .load(Size::W, R1, R7, Flow::RULE)
            .store(Size::W, R10, frame::RULE, R1)
            .store(Size::Dw, R10, frame::NOW, R8)
            .store(Size::W, R10, frame::REASON, Reason::Allowed as i32);
        self.send_event(kind);
    }

    /// Uses `R2`.
    fn state(&mut self, state: FlowState, timeout: u64) {
        self.asm.store(Size::B, R7, Flow::STATE, state as i32).load_imm64(R2, timeout).store(
            Size::Dw,
            R7,
            Flow::TIMEOUT,
            R2,
        );
    }

    fn count_in_flow(&mut self) {
        let (packets, bytes) = counters(self.direction);
        self.asm.store(Size::Dw, R7, Flow::LAST_SEEN, R8).call(Helper::Jiffies64).store(Size::Dw, R7, Flow::TICK, R0);
        self.add_packet(R7, packets, bytes);
    }

    /// The verdicts of the classifiers, for new and for stale flows; `R0` is the rule.
    pub(super) fn judge(&mut self, allow: impl FnOnce(&mut Self)) {
        let Judgement::Classifiers { egress, ingress, members_v6_bits, .. } = self.judgement else { return };
        self.classify(members_v6_bits);
        let exits = super::Exits::new(&mut self.asm);
        let by_ingress = self.asm.label();
        self.asm.load(Size::W, R4, R10, frame::JUDGE).jump_if(Cond::Ne, R4, Direction::Egress as i32, by_ingress);
        egress.emit(&mut self.asm, &exits);
        self.asm.bind(by_ingress);
        ingress.emit(&mut self.asm, &exits);
        if exits.allow_used() {
            self.asm.bind(exits.allow());
            allow(self);
        }
        if exits.deny_used() {
            self.asm.bind(exits.deny());
            self.deny();
        }
    }

    fn allow(&mut self, timeouts: &Timeouts, hit: Label) {
        let [gone, new] = self.labels();
        self.asm
            .store(Size::W, R10, frame::RULE, R0)
            .load(Size::W, R1, R10, frame::FLAGS)
            .and(R1, frame::STALE)
            .jump_if(Cond::Eq, R1, 0, new)
            .load(Size::W, R7, R10, frame::RULE);
        // Found again: a pointer kept on the stack would have to be proven valid here, and this is rare.
        self.flow_again();
        self.asm
            .jump_if(Cond::Eq, R0, 0, gone)
            .load(Size::W, R1, R10, frame::GENERATION)
            .store(Size::W, R0, Flow::GENERATION, R1)
            .load(Size::H, R1, R9, Endpoint::TENURE)
            .store(Size::H, R0, Flow::TENURE, R1)
            .store(Size::W, R0, Flow::RULE, R7)
            .mov(R7, R0)
            .call(Helper::KtimeGetCoarseNs)
            .mov(R8, R0)
            .load(Size::B, R1, R7, Flow::DIRECTION)
            .jump(hit);

        // An error about a flow that has been removed meanwhile is none.
        let related = self.pass(Reason::Related);
        self.asm.bind(gone);
        self.if_flags(frame::RELATED, related);
        self.asm.bind(new).load(Size::W, R1, R10, frame::RULE);
        self.count(abi::RULES, R1);
        let stateless = self.asm.label();
        self.if_flags(frame::STATELESS, stateless);
        let full = self.drop(Reason::ConntrackFull);
        self.new_flow(timeouts);
        self.update(abi::CONNTRACK_NEW, frame::KEY, frame::FLOW);
        let only = self.asm.label();
        self.asm
            .jump_if(Cond::Ne, R0, 0, full)
            .load(Size::W, R1, R10, frame::FLAGS)
            .and(R1, frame::REPLACES | frame::BEGUN)
            .jump_if(
                // What was found among the new ones has been written over.
                Cond::Ne,
                R1,
                frame::REPLACES,
                only,
            );
        self.forget(abi::CONNTRACK);
        self.asm.bind(only);
        self.count_reason(Reason::Allowed);
        self.note_head();
        self.asm.store(Size::W, R10, frame::REASON, Reason::Allowed as i32);
        self.packet_counters();
        self.send_event(EventKind::New);

        self.asm.bind(stateless);
        self.count_reason(Reason::Allowed);
        self.note_head();
        self.asm.ret(TC_ACT_UNSPEC);
    }

    fn deny(&mut self) {
        let (denied, revoked) = (self.drop(Reason::Denied), self.drop(Reason::Revoked));
        let [stale, foreign] = self.labels();
        self.asm.store(Size::W, R10, frame::RULE, R0);
        self.pass_answer();
        self.asm.load(Size::W, R1, R10, frame::FLAGS).jump_if(Cond::Set, R1, frame::STALE, stale).load(
            Size::W,
            R1,
            R10,
            frame::RULE,
        );
        self.count(abi::RULES, R1);
        // The entry stays, for without it the answers would open the flow anew, and as long as packets come.
        self.asm.jump(denied).bind(stale).jump_if(Cond::Set, R1, frame::RELATED, revoked);
        self.flow_again();
        self.asm
            .jump_if(Cond::Eq, R0, 0, revoked)
            .load(Size::H, R1, R0, Flow::TENURE)
            .load(Size::H, R2, R9, Endpoint::TENURE)
            .jump_if(Cond::Ne, R1, R2, foreign)
            .load(Size::Dw, R1, R10, frame::NOW)
            .store(Size::Dw, R0, Flow::LAST_SEEN, R1)
            .jump(revoked)
            .bind(foreign);
        self.forget(abi::CONNTRACK);
        self.forget(abi::CONNTRACK_NEW);
        self.asm.jump(revoked);
    }

    /// Puts a new flow's value on the stack.
    fn new_flow(&mut self, timeouts: &Timeouts) {
        let flow = frame::FLOW;
        let [tcp, udp, timed, established, closing] = self.labels();
        self.asm
            .call(Helper::KtimeGetCoarseNs)
            .store(Size::Dw, R10, frame::NOW, R0)
            .store(Size::Dw, R10, flow + Flow::LAST_SEEN, R0)
            .load(Size::W, R1, R10, frame::GENERATION)
            .store(Size::W, R10, flow + Flow::GENERATION, R1)
            .load(Size::W, R1, R10, frame::RULE)
            .store(Size::W, R10, flow + Flow::RULE, R1);
        self.asm
            .load(Size::W, R1, R10, frame::JUDGE)
            .store(Size::Dw, R10, flow + Flow::DIRECTION, 0)
            .store(Size::B, R10, flow + Flow::DIRECTION, R1)
            .store(Size::Dw, R10, flow + Flow::TICK, 0)
            .load(Size::H, R1, R9, Endpoint::TENURE)
            .store(Size::H, R10, flow + Flow::TENURE, R1)
            .load(Size::B, R2, R10, frame::PROTOCOL)
            .jump_if(Cond::Eq, R2, TCP, tcp)
            .jump_if(Cond::Eq, R2, UDP, udp)
            .load_imm64(R1, timeouts.other_ns())
            .jump(timed)
            .bind(udp)
            .load_imm64(R1, timeouts.udp_new_ns())
            .jump(timed)
            .bind(tcp)
            .load(Size::W, R2, R10, frame::TCP_FLAGS)
            .jump_if(Cond::Set, R2, FIN | RST, closing)
            .and(R2, SYN | ACK)
            .jump_if(Cond::Ne, R2, SYN, established)
            .load_imm64(R1, timeouts.tcp_new_ns())
            .jump(timed)
            .bind(established)
            .store(Size::B, R10, flow + Flow::STATE, FlowState::Established as i32)
            .load_imm64(R1, timeouts.tcp_established_ns())
            .jump(timed)
            .bind(closing)
            .store(Size::B, R10, flow + Flow::STATE, FlowState::Closing as i32)
            .load_imm64(R1, timeouts.tcp_closing_ns())
            .bind(timed)
            .store(Size::Dw, R10, flow + Flow::TIMEOUT, R1);
        let (own, other) = (counters(self.direction), counters(self.direction.opposite()));
        self.asm
            .load(Size::W, R1, R6, SKB_LEN)
            .store(Size::Dw, R10, flow + own.0, 1)
            .store(Size::Dw, R10, flow + own.1, R1)
            .store(Size::Dw, R10, flow + other.0, 0)
            .store(Size::Dw, R10, flow + other.1, 0);
    }
}

/// Offsets of a direction's counters.
const fn counters(direction: Direction) -> (i16, i16) {
    match direction {
        Direction::Egress => (Flow::EGRESS_PACKETS, Flow::EGRESS_OCTETS),
        Direction::Ingress => (Flow::INGRESS_PACKETS, Flow::INGRESS_OCTETS),
    }
}

const fn generation_offset(direction: Direction) -> i16 {
    match direction {
        Direction::Egress => Endpoint::GENERATION_EGRESS,
        Direction::Ingress => Endpoint::GENERATION_INGRESS,
    }
}

/// How many answers a flow without proof needs: a flood of false addresses is then as many times dearer.
const ANSWERS_WITHOUT_PROOF: i32 = 3;

/// More than a server sends before the first acknowledgement comes: ten segments (RFC 6928), of jumbo frames too.
const FIRST_WINDOW: i32 = 1 << 17;

// Flags of the TCP header (RFC 9293, section 3.1).
const FIN: i32 = 0x01;
const SYN: i32 = 0x02;
const RST: i32 = 0x04;
const ACK: i32 = 0x10;
