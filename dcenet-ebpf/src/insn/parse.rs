//! From text to instructions: reads what [`super::text`] writes.

use std::str::FromStr;

use super::{AluOp, AtomicOp, Cond, Helper, Imm64, Insn, Order, Reg, Size, Src, SwapWidth, Width};

/// Text that is no listing. Lines and columns count from 1, columns in characters.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {kind}")]
pub struct ParseError {
    /// The line.
    pub line: usize,
    /// Where in the line.
    pub column: usize,
    /// What is wrong there.
    pub kind: ParseErrorKind,
}

/// What is wrong with a listing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseErrorKind {
    /// Something else stands there.
    #[error("{found:?} stands where {expected} is due")]
    Expected {
        /// What may stand there.
        expected: &'static str,
        /// The rest of the line.
        found: String,
    },
    /// A number that its field cannot hold.
    #[error("{number} does not fit into {field}")]
    Range {
        /// The number as written.
        number: String,
        /// The field and its width.
        field: &'static str,
    },
    /// The slot in front of an instruction is not the one that it has: a line is missing, or too many.
    #[error("the instruction has slot {due}, not {found}; leave slots out, or number them all")]
    Slot {
        /// The slot that follows from the lines before.
        due: usize,
        /// The slot as written.
        found: usize,
    },
    /// A helper whose name and number do not belong together, or that this crate does not name.
    #[error("dcenet_ebpf::insn::Helper knows no {name}#{id}")]
    Helper {
        /// The name as written, without `bpf_`.
        name: String,
        /// The number as written.
        id: u32,
    },
    /// The two registers of an instruction that has one, twice.
    #[error("{found} stands where {due} is due once more")]
    OtherRegister {
        /// The register that the instruction began with.
        due: Reg,
        /// What stands there.
        found: Reg,
    },
}

/// Reads a listing as [`disassemble`](super::disassemble) writes it: an instruction a line, the slot with a colon in front
/// if wanted. Empty lines, and all from `;` to the end of a line, are passed over. What [`disassemble`](super::disassemble)
/// writes of an [`Insn`] that has no encoding is refused: atomic operations on 1 or 2 bytes, and sign extension of 8.
///
/// # Errors
/// At the first character that cannot be; see [`ParseErrorKind`].
///
/// # Examples
/// ```
/// use dcenet_ebpf::insn::{disassemble, parse};
///
/// let code = parse("r0 = *(u32 *)(r1 +0) ; the length\n if r0 > 100 goto +1\n r0 = 100\n exit")?;
/// assert_eq!(code.len(), 4);
/// assert_eq!(parse(&disassemble(&code))?, code);
///
/// let error = parse("r0 = 1\nr0 += r11").unwrap_err();
/// assert_eq!(error.to_string(), r#"line 2, column 7: "r11" stands where a register from r0 to r10 is due"#);
/// # Ok::<(), dcenet_ebpf::insn::ParseError>(())
/// ```
pub fn parse(text: &str) -> Result<Vec<Insn>, ParseError> {
    let mut insns = Vec::new();
    let mut slot = 0;
    for (at, line) in text.lines().enumerate() {
        let code = line.split_once(';').map_or(line, |(code, _)| code);
        let mut cursor = Cursor { line: at + 1, text: code, at: 0 };
        cursor.skip_spaces();
        if cursor.rest().is_empty() {
            continue;
        }
        cursor.slot(slot)?;
        let insn = cursor.insn()?;
        cursor.end()?;
        slot += insn.slots();
        insns.push(insn);
    }
    Ok(insns)
}

impl FromStr for Insn {
    type Err = ParseError;

    /// Reads one instruction as `Display` writes it. Unlike in [`parse`], the end of a line is a space as others are, so that
    /// all counts as line 1, and there are no comments.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let mut cursor = Cursor { line: 1, text, at: 0 };
        cursor.skip_spaces();
        let insn = cursor.insn()?;
        cursor.end()?;
        Ok(insn)
    }
}

/// A place in a line. Every `take_*` leaves it where it was when it finds nothing.
struct Cursor<'a> {
    line: usize,
    text: &'a str,
    at: usize,
}

type Parsed<T> = Result<T, ParseError>;

/// Longer ones first, where one begins with another.
const ALU: [(&str, AluOp); 14] = [
    ("s>>=", AluOp::Arsh),
    ("<<=", AluOp::Lsh),
    (">>=", AluOp::Rsh),
    ("s/=", AluOp::Sdiv),
    ("s%=", AluOp::Smod),
    ("+=", AluOp::Add),
    ("-=", AluOp::Sub),
    ("*=", AluOp::Mul),
    ("/=", AluOp::Div),
    ("|=", AluOp::Or),
    ("&=", AluOp::And),
    ("%=", AluOp::Mod),
    ("^=", AluOp::Xor),
    ("=", AluOp::Mov),
];

const COND: [(&str, Cond); 11] = [
    ("s>=", Cond::Sge),
    ("s<=", Cond::Sle),
    ("s>", Cond::Sgt),
    ("s<", Cond::Slt),
    ("==", Cond::Eq),
    ("!=", Cond::Ne),
    (">=", Cond::Ge),
    ("<=", Cond::Le),
    (">", Cond::Gt),
    ("<", Cond::Lt),
    ("&", Cond::Set),
];

const LOCKED: [(&str, AtomicOp); 4] =
    [("+=", AtomicOp::Add), ("|=", AtomicOp::Or), ("&=", AtomicOp::And), ("^=", AtomicOp::Xor)];

const FETCHING: [(&str, AtomicOp); 6] = [
    ("_fetch_add", AtomicOp::FetchAdd),
    ("_fetch_or", AtomicOp::FetchOr),
    ("_fetch_and", AtomicOp::FetchAnd),
    ("_fetch_xor", AtomicOp::FetchXor),
    ("_xchg", AtomicOp::Xchg),
    ("_cmpxchg", AtomicOp::Cmpxchg),
];

const UNSIGNED: [(&str, Size); 4] = [("u8", Size::B), ("u16", Size::H), ("u32", Size::W), ("u64", Size::Dw)];
const SIGNED: [(&str, Size); 3] = [("s8", Size::B), ("s16", Size::H), ("s32", Size::W)];
const SWAPS: [(&str, Order); 3] = [("bswap", Order::Reverse), ("le", Order::Le), ("be", Order::Be)];
const SWAP_WIDTHS: [(&str, SwapWidth); 3] = [("16", SwapWidth::W16), ("32", SwapWidth::W32), ("64", SwapWidth::W64)];

const REGISTER: &str = "a register from r0 to r10";

impl Cursor<'_> {
    fn insn(&mut self) -> Parsed<Insn> {
        if self.take("exit") {
            return Ok(Insn::Exit);
        }
        if self.take("gotol") {
            let off = self.number("a jump's 32 bits", true)?;
            return Ok(Insn::JumpLong { off });
        }
        if self.take("goto") {
            return Ok(Insn::Jump { off: self.number("a jump's 16 bits", true)? });
        }
        if self.take("if") {
            return self.branch();
        }
        if self.take("call") {
            return self.call();
        }
        if self.take("lock") {
            self.expect("*")?;
            let (size, base, off) = self.place_in_memory()?;
            let op = self.one_of(&LOCKED, "+=, |=, &= or ^=")?;
            return Ok(Insn::Atomic { op, size, base, off, src: self.wide_register()? });
        }
        if self.take("*") {
            self.expect("(")?;
            let size = self.one_of(&UNSIGNED, "u8, u16, u32 or u64")?;
            let (base, off) = self.address()?;
            self.expect("=")?;
            let src = match self.take_register() {
                Some((Width::W64, reg)) => Src::Reg(reg),
                Some(_) => return Err(self.expected("a 64-bit register or a number")),
                None => Src::Imm(self.number("a constant's 32 bits", false)?),
            };
            return Ok(Insn::Store { size, base, off, src });
        }
        let start = self.at;
        let Some((width, dst)) = self.take_register() else { return Err(self.expected("an instruction")) };
        let op = self.one_of(&ALU, "an operation such as = or +=")?;
        if op != AluOp::Mov {
            return Ok(Insn::Alu { width, op, dst, src: self.operand(width)? });
        }
        self.assignment(start, width, dst)
    }

    /// What follows `dst =`, which began at `start`.
    fn assignment(&mut self, start: usize, width: Width, dst: Reg) -> Parsed<Insn> {
        if self.take("(") {
            let from = self.one_of(&SIGNED, "s8, s16 or s32")?;
            self.expect(")")?;
            let src = self.register(width)?;
            return Ok(Insn::MovSx { width, from, dst, src });
        }
        if let Some(minus) = self.take_minus_register(width) {
            return if minus == dst {
                Ok(Insn::Neg { width, dst })
            } else {
                Err(self.error(ParseErrorKind::OtherRegister { due: dst, found: minus }))
            };
        }
        // All that follows, but for the plain move, has no 32-bit form.
        let wide = |cursor: &mut Self, insn| {
            if width == Width::W64 {
                return Ok(insn);
            }
            cursor.at = start;
            Err(cursor.expected("a 64-bit register"))
        };
        if self.take("*") {
            self.expect("(")?;
            let insn = if let Some(size) = self.take_one_of(&UNSIGNED) {
                let (base, off) = self.address()?;
                Insn::Load { size, dst, base, off }
            } else {
                let size = self.one_of(&SIGNED, "u8, u16, u32, u64, s8, s16 or s32")?;
                let (base, off) = self.address()?;
                Insn::LoadSx { size, dst, base, off }
            };
            return wide(self, insn);
        }
        if self.take("map") {
            let fd = self.bracketed("a map's 32 bits", false)?;
            if !self.take("[0]") {
                return wide(self, Insn::LoadImm64 { dst, value: Imm64::MapFd(fd) });
            }
            self.expect("+")?;
            let offset = self.number("an offset's 32 bits", false)?;
            return wide(self, Insn::LoadImm64 { dst, value: Imm64::MapValue { fd, offset } });
        }
        if self.take("func") {
            let distance = self.bracketed("a distance's 32 bits", true)?;
            return wide(self, Insn::LoadImm64 { dst, value: Imm64::Func(distance) });
        }
        let value = self.at;
        if self.take("0x") {
            let digits = self.word(|c| c.is_ascii_hexdigit());
            let number = match u64::from_str_radix(&digits, 16) {
                Ok(number) => number,
                Err(_) if digits.is_empty() => return Err(self.expected("a hexadecimal number")),
                Err(_) => {
                    self.at = value;
                    return Err(self.range(format!("0x{digits}"), "64 bits"));
                }
            };
            self.expect("ll")?;
            return wide(self, Insn::LoadImm64 { dst, value: Imm64::Value(number) });
        }
        if self.rest().starts_with("atomic") {
            let insn = self.fetching(dst)?;
            return wide(self, insn);
        }
        if let Some(order) = self.take_one_of(&SWAPS) {
            let bits = self.one_of(&SWAP_WIDTHS, "16, 32 or 64")?;
            self.same(dst)?;
            return wide(self, Insn::Swap { order, bits, dst });
        }
        Ok(Insn::Alu { width, op: AluOp::Mov, dst, src: self.operand(width)? })
    }

    /// `atomic64_fetch_add((u64 *)(r1 +0), r2)`, whose result goes to `dst`.
    fn fetching(&mut self, dst: Reg) -> Parsed<Insn> {
        self.expect("atomic")?;
        let start = self.at;
        let wide = self.take("64");
        let op = self.one_of(&FETCHING, "_fetch_add, _fetch_or, _fetch_and, _fetch_xor, _xchg or _cmpxchg")?;
        self.expect("(")?;
        let (size, base, off) = self.place_in_memory()?;
        if wide != (size == Size::Dw) {
            self.at = start;
            return Err(self.expected("64 for u64, and nothing for u32"));
        }
        self.expect(",")?;
        let src = if op == AtomicOp::Cmpxchg {
            if dst != Reg::R0 {
                return Err(self.error(ParseErrorKind::OtherRegister { due: Reg::R0, found: dst }));
            }
            self.same(Reg::R0)?;
            self.expect(",")?;
            self.wide_register()?
        } else {
            self.same(dst)?;
            dst
        };
        self.expect(")")?;
        Ok(Insn::Atomic { op, size, base, off, src })
    }

    fn branch(&mut self) -> Parsed<Insn> {
        let Some((width, dst)) = self.take_register() else { return Err(self.expected(REGISTER)) };
        let cond = self.one_of(&COND, "a condition such as == or s<")?;
        let src = self.operand(width)?;
        self.expect("goto")?;
        Ok(Insn::JumpIf { width, cond, dst, src, off: self.number("a jump's 16 bits", true)? })
    }

    fn call(&mut self) -> Parsed<Insn> {
        let start = self.at;
        if self.take("pc") {
            return Ok(Insn::CallLocal { off: self.number("a call's 32 bits", true)? });
        }
        let name = self.word(|c| c.is_ascii_alphanumeric() || c == '_');
        if name.is_empty() {
            return Err(self.expected("pc and a distance, or a helper's name"));
        }
        self.expect("#")?;
        let id = self.number("a helper's 32 bits", false)?;
        let known = Helper::from_id(id).filter(|helper| helper.name().strip_prefix("bpf_") == Some(&name));
        match known {
            Some(helper) => Ok(Insn::Call { helper }),
            None => {
                self.at = start;
                Err(self.error(ParseErrorKind::Helper { name, id }))
            }
        }
    }

    /// `(u32 *)(r1 +8)`, of 4 or 8 bytes.
    fn place_in_memory(&mut self) -> Parsed<(Size, Reg, i16)> {
        self.expect("(")?;
        let size = self.one_of(&UNSIGNED[2..], "u32 or u64")?;
        let (base, off) = self.address()?;
        Ok((size, base, off))
    }

    /// What follows the type: ` *)(r1 +8)`.
    fn address(&mut self) -> Parsed<(Reg, i16)> {
        self.expect("*")?;
        self.expect(")")?;
        self.expect("(")?;
        let base = self.wide_register()?;
        let off = self.number("an offset's 16 bits", true)?;
        self.expect(")")?;
        Ok((base, off))
    }

    fn bracketed(&mut self, field: &'static str, signed: bool) -> Parsed<i32> {
        self.expect("[")?;
        let number = self.number(field, signed)?;
        self.expect("]")?;
        Ok(number)
    }

    fn operand(&mut self, width: Width) -> Parsed<Src> {
        match self.rest().starts_with(['r', 'w']) {
            true => Ok(Src::Reg(self.register(width)?)),
            false => Ok(Src::Imm(self.number("a constant's 32 bits", false)?)),
        }
    }

    fn wide_register(&mut self) -> Parsed<Reg> {
        self.register(Width::W64)
    }

    fn register(&mut self, width: Width) -> Parsed<Reg> {
        let start = self.at;
        match self.take_register() {
            Some((found, reg)) if found == width => Ok(reg),
            found => {
                self.at = start;
                Err(self.expected(match (found, width) {
                    (None, _) => REGISTER,
                    (_, Width::W64) => "a 64-bit register",
                    (_, Width::W32) => "a 32-bit register",
                }))
            }
        }
    }

    /// The same 64-bit register once more.
    fn same(&mut self, due: Reg) -> Parsed<()> {
        let start = self.at;
        let found = self.wide_register()?;
        if found != due {
            self.at = start;
            return Err(self.error(ParseErrorKind::OtherRegister { due, found }));
        }
        Ok(())
    }

    fn take_register(&mut self) -> Option<(Width, Reg)> {
        let start = self.at;
        let width = if self.take("r") {
            Width::W64
        } else if self.take("w") {
            Width::W32
        } else {
            return None;
        };
        // No space may stand between letter and number.
        let adjacent = self.at == start + 1;
        let digits = self.word(|c| c.is_ascii_alphanumeric());
        let reg = Reg::ALL.into_iter().find(|reg| adjacent && reg.index().to_string() == digits);
        if reg.is_none() {
            self.at = start;
        }
        Some((width, reg?))
    }

    fn take_minus_register(&mut self, width: Width) -> Option<Reg> {
        let start = self.at;
        if self.take("-")
            && let Some((found, reg)) = self.take_register()
            && found == width
        {
            return Some(reg);
        }
        self.at = start;
        None
    }

    /// A decimal number; `signed`: with its sign, as distances have it. Without, a minus is allowed all the same.
    fn number<T: TryFrom<i64>>(&mut self, field: &'static str, signed: bool) -> Parsed<T> {
        let start = self.at;
        let (plus, minus) = (self.take("+"), self.take("-"));
        let digits = self.word(|c| c.is_ascii_digit());
        if digits.is_empty() || (plus && minus) || (signed && !plus && !minus) || (plus && !signed) {
            self.at = start;
            return Err(self.expected(if signed { "a number with its sign" } else { "a number" }));
        }
        let sign = if minus { "-" } else { "" };
        let number = format!("{sign}{digits}").parse::<i64>().ok().and_then(|number| T::try_from(number).ok());
        match number {
            Some(number) => Ok(number),
            None => {
                self.at = start;
                Err(self.range(format!("{sign}{digits}"), field))
            }
        }
    }

    /// The slot in front of the instruction, where one stands there.
    fn slot(&mut self, due: usize) -> Parsed<()> {
        let start = self.at;
        let digits = self.word(|c| c.is_ascii_digit());
        if digits.is_empty() {
            return Ok(());
        }
        self.expect(":")?;
        match digits.parse() {
            Ok(found) if found == due => Ok(()),
            found => {
                self.at = start;
                let Ok(found) = found else { return Err(self.range(digits, "a slot's number")) };
                Err(self.error(ParseErrorKind::Slot { due, found }))
            }
        }
    }

    fn end(&self) -> Parsed<()> {
        if self.rest().is_empty() { Ok(()) } else { Err(self.expected("the end of the line")) }
    }

    fn one_of<T: Copy>(&mut self, words: &[(&str, T)], expected: &'static str) -> Parsed<T> {
        self.take_one_of(words).ok_or_else(|| self.expected(expected))
    }

    fn take_one_of<T: Copy>(&mut self, words: &[(&str, T)]) -> Option<T> {
        words.iter().find(|(word, _)| self.take(word)).map(|(_, value)| *value)
    }

    fn expect(&mut self, word: &'static str) -> Parsed<()> {
        if self.take(word) { Ok(()) } else { Err(self.expected(word)) }
    }

    /// Takes a word, and the spaces behind it.
    fn take(&mut self, word: &str) -> bool {
        let found = self.rest().starts_with(word);
        if found {
            self.at += word.len();
            self.skip_spaces();
        }
        found
    }

    fn word(&mut self, of: impl Fn(char) -> bool) -> String {
        let rest = self.rest();
        let word = rest[..rest.find(|c| !of(c)).unwrap_or(rest.len())].to_owned();
        self.at += word.len();
        self.skip_spaces();
        word
    }

    fn skip_spaces(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start().len();
    }

    fn rest(&self) -> &str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn expected(&self, expected: &'static str) -> ParseError {
        self.error(ParseErrorKind::Expected { expected, found: self.rest().trim_end().to_owned() })
    }

    fn range(&self, number: String, field: &'static str) -> ParseError {
        self.error(ParseErrorKind::Range { number, field })
    }

    fn error(&self, kind: ParseErrorKind) -> ParseError {
        let column = self.text.get(..self.at).map_or(0, |before| before.chars().count()) + 1;
        ParseError { line: self.line, column, kind }
    }
}
