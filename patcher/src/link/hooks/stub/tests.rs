//! Stubs run by a small machine of their own, written from the manual alone: registers, a stack, tables.

use std::collections::BTreeMap;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Register};

use super::*;

const BACK: Gva = Gva(0xffff_ffff_8100_0007);
const THUNK: Gva = Gva(0xffff_ffff_8200_0000);
/// mov $0x82e72ac0 (sign-extended), %rax
const DISPLACED: [u8; 7] = [0x48, 0xc7, 0xc0, 0xc0, 0x2a, 0xe7, 0x82];
const TABLE: u64 = WINDOW_START.0 + 0x9000;

#[derive(Debug, PartialEq, Eq)]
enum End {
    /// `ret`, or the jump to the thunk that returns.
    Returned,
    /// On in the function, behind what was displaced.
    WentOn,
}

/// Registers by number, and memory in words of eight bytes and entries' fields of four.
struct Cpu {
    registers: BTreeMap<Register, u64>,
    words: BTreeMap<u64, u64>,
    fields: BTreeMap<u64, i32>,
    stack: Vec<u64>,
    equal: bool,
    carry: bool,
}

impl Cpu {
    fn new(address: u64) -> Self {
        let registers = [
            (Register::RDI, address),
            (Register::RCX, 0xc0c0),
            (Register::RAX, 0xa0a0),
        ];
        Self {
            registers: registers.into(),
            words: BTreeMap::new(),
            fields: BTreeMap::new(),
            stack: Vec::new(),
            equal: false,
            carry: false,
        }
    }

    fn get(&self, register: Register) -> u64 {
        let whole = self.registers[&register.full_register()];
        if register.size() == 4 {
            whole & 0xffff_ffff
        } else {
            whole
        }
    }

    fn set(&mut self, register: Register, value: u64) {
        self.registers.insert(register, value);
    }

    fn address(&self, it: &Instruction) -> u64 {
        let part = |register| match register {
            Register::None => 0,
            register => self.get(register),
        };
        let index = part(it.memory_index()).wrapping_mul(it.memory_index_scale().into());
        part(it.memory_base())
            .wrapping_add(index)
            .wrapping_add(it.memory_displacement64())
    }

    fn compare(&mut self, left: u64, right: u64) {
        (self.equal, self.carry) = (left == right, left < right);
    }

    /// That the return address lies where the unwind data has it, as long as it says anything.
    fn is_as_rows_say(&self, ip: u64) {
        let rows = Table::ALL.map(rows).concat();
        let row = rows.iter().rev().find(|(at, _)| at.0 <= ip).unwrap();
        let pushed = self.stack.len() as i16 * 8;
        assert!(
            row.1 == Entry::UNDEFINED || row.1.sp_offset == 8 + pushed,
            "{ip:#x}: {row:?}"
        );
    }

    fn run(&mut self, code: &[u8], start: Gva) -> End {
        let mut ip = start.0;
        for _ in 0..1000 {
            if ip == BACK.0 {
                return End::WentOn;
            }
            if ip == THUNK.0 {
                return End::Returned;
            }
            self.is_as_rows_say(ip);
            let from = (ip - start.0) as usize;
            let it = Decoder::with_ip(64, &code[from..], ip, DecoderOptions::NONE).decode();
            ip = it.next_ip();
            let to = it.near_branch_target();
            let (first, second) = (it.op0_register(), it.op1_register());
            match it.code() {
                Code::Push_r64 => self.stack.push(self.get(first)),
                Code::Pop_r64 => {
                    let value = self.stack.pop().unwrap();
                    self.set(first, value);
                }
                Code::Lea_r64_m => self.set(first, self.address(&it)),
                Code::Shr_rm64_imm8 => self.set(first, self.get(first) >> it.immediate8()),
                Code::Cmp_RAX_imm32 => {
                    self.compare(self.get(Register::RAX), it.immediate(1));
                }
                Code::Cmp_rm64_r64 => self.compare(self.get(first), self.get(second)),
                Code::Test_rm64_r64 | Code::Test_rm32_r32 => {
                    assert_eq!(first, second);
                    self.compare(self.get(first), 0);
                }
                Code::Mov_r64_rm64 => self.set(first, self.words[&self.address(&it)]),
                Code::Movsxd_r64_rm32 => {
                    let field = i64::from(self.fields[&self.address(&it)]);
                    self.set(first, field.cast_unsigned());
                }
                Code::Add_rm64_r64 => {
                    self.set(first, self.get(first).wrapping_add(self.get(second)));
                }
                Code::Add_rm64_imm8 => {
                    self.set(first, self.get(first).wrapping_add(it.immediate(1)));
                }
                Code::Mov_rm64_imm32 => self.set(first, it.immediate(1)),
                Code::Jae_rel8_64 if !self.carry => ip = to,
                Code::Je_rel8_64 if self.equal => ip = to,
                Code::Jae_rel8_64 | Code::Je_rel8_64 => {}
                Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => ip = to,
                Code::Retnq => return End::Returned,
                other => panic!("{other:?} at {:#x}", it.ip()),
            }
        }
        panic!("it does not end");
    }
}

/// Runs a stub for an address, with a table of entries for these addresses on page 5 of the window.
fn looked_up(returns: Returns, entries: &[u64], address: u64) -> (End, Cpu) {
    let table = Table::Bugs;
    let code = encode(table, &DISPLACED, BACK, returns).unwrap();
    assert!(code.len() <= crate::arena::fixed::STUB);
    let mut cpu = Cpu::new(address);
    for page in 0..u64::from(WINDOW_PAGES) {
        let known = if page == 5 { TABLE } else { 0 };
        cpu.words.insert(table.directory().0 + page * 8, known);
    }
    for (index, entry) in entries.iter().enumerate() {
        let field = TABLE + (index * ENTRY) as u64;
        let distance = entry.wrapping_sub(field).cast_signed();
        cpu.fields.insert(field, i32::try_from(distance).unwrap());
    }
    cpu.fields.insert(TABLE + (entries.len() * ENTRY) as u64, 0);
    let end = cpu.run(&code, table.stub());
    assert!(cpu.stack.is_empty(), "the stack is as before");
    assert_eq!(
        cpu.get(Register::RCX),
        0xc0c0,
        "every register but rax is kept"
    );
    assert_eq!(cpu.get(Register::RDI), address);
    (end, cpu)
}

const PAGE: u64 = WINDOW_START.0 + 5 * 4096;

#[test]
fn an_address_in_a_table_is_answered_with_its_entry_however_the_boot_returns() {
    for returns in [
        Returns::Plain,
        Returns::Thunk(THUNK),
        Returns::LowerHalf(THUNK),
    ] {
        let entries = [PAGE + 2, PAGE + 0x10, PAGE + 4094];
        for (index, address) in entries.iter().enumerate() {
            let (end, cpu) = looked_up(returns, &entries, *address);
            assert_eq!(end, End::Returned);
            assert_eq!(cpu.get(Register::RAX), TABLE + (index * ENTRY) as u64);
        }
    }
}

#[test]
fn every_other_address_is_looked_up_by_the_kernel_as_before() {
    let elsewhere = [
        PAGE + 3,
        PAGE - 4096 + 2,
        WINDOW_START.0,
        WINDOW_START.0 - 1,
        WINDOW_START.0 + u64::from(WINDOW_PAGES) * 4096,
        0,
        0x7fff_ffff_f000,
        BACK.0,
        u64::MAX,
    ];
    for address in elsewhere {
        let (end, cpu) = looked_up(Returns::Plain, &[PAGE + 2], address);
        assert_eq!(end, End::WentOn, "{address:#x}");
        let displaced = 0xffff_ffff_82e7_2ac0;
        assert_eq!(
            cpu.get(Register::RAX),
            displaced,
            "what was displaced has run"
        );
    }
}

#[test]
fn an_empty_table_ends_the_search() {
    let (end, _) = looked_up(Returns::Plain, &[], PAGE + 2);
    assert_eq!(end, End::WentOn);
}

#[test]
fn what_was_displaced_stands_in_the_stub_as_it_was() {
    let code = encode(Table::Faults, &DISPLACED, BACK, Returns::Plain).unwrap();
    assert!(code[..code.len() - 5].ends_with(&DISPLACED));
}

#[test]
fn only_behind_the_first_displaced_instruction_nothing_is_known_of_the_stack() {
    for table in Table::ALL {
        let rows = rows(table);
        let code = encode(table, &DISPLACED, BACK, Returns::Plain).unwrap();
        let displaced = code.len() - 5 - DISPLACED.len();
        assert_eq!(rows[0], (table.stub(), Entry::FUNCTION_START));
        let last = table.stub().wrapping_add(displaced as u64 + 1);
        assert_eq!(rows.last(), Some(&(last, Entry::UNDEFINED)));
        assert!(rows.is_sorted_by(|one, other| one.0 < other.0));
    }
}
