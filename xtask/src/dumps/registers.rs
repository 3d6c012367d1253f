//! QEMU's `info registers -a` as the list of vCPUs that a dump folder holds. QEMU does not tell LSTAR nor the kernel's GS base
//! (QEMU 7.2 target/i386/cpu-dump.c), so both stay null.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// General registers in the order that instructions number them (Intel SDM vol. 2, table 2-2).
const GENERAL: [&str; 16] = [
    "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13",
    "R14", "R15",
];

/// All vCPUs.
pub(super) fn parse(text: &str) -> Result<Vec<Value>> {
    let blocks: Vec<&str> = text.split("CPU#").skip(1).collect();
    if blocks.is_empty() {
        bail!("QEMU shows no CPU");
    }
    blocks
        .iter()
        .enumerate()
        .map(|(index, block)| Cpu::read(block).to_json(index))
        .collect()
}

/// Numbers by name: `RIP=…` has one, a segment `CS =sel base limit flags` four, a table `IDT= base limit` two.
struct Cpu<'a>(BTreeMap<&'a str, Vec<u64>>);

impl<'a> Cpu<'a> {
    fn read(block: &'a str) -> Self {
        let mut numbers = BTreeMap::new();
        for line in block.lines() {
            let mut rest = line;
            while let Some((before, after)) = rest.split_once('=') {
                let name = before.trim_end().rsplit(' ').next().unwrap_or_default();
                let values = after
                    .split_whitespace()
                    .map_while(|w| u64::from_str_radix(w, 16).ok())
                    .collect();
                numbers.entry(name).or_insert(values);
                rest = after;
            }
        }
        Self(numbers)
    }

    fn at(&self, name: &str, position: usize) -> Result<u64> {
        self.0
            .get(name)
            .and_then(|n| n.get(position))
            .copied()
            .with_context(|| format!("QEMU shows no {name}"))
    }

    fn to_json(&self, index: usize) -> Result<Value> {
        let one = |name: &str| self.at(name, 0);
        let general: Vec<u64> = GENERAL
            .iter()
            .map(|name| one(name))
            .collect::<Result<_>>()?;
        Ok(json!({
            "index": index,
            "activity": if one("HLT")? == 1 { "halted" } else { "running" },
            "general": general,
            "rip": one("RIP")?, "rflags": one("RFL")?, "cpl": one("CPL")?,
            "cs": one("CS")?, "ss": one("SS")?,
            "fs_base": self.at("FS", 1)?, "gs_base": self.at("GS", 1)?, "kernel_gs_base": null,
            "cr0": one("CR0")?, "cr2": one("CR2")?, "cr3": one("CR3")?, "cr4": one("CR4")?, "efer": one("EFER")?,
            "idt_base": one("IDT")?, "gdt_base": one("GDT")?, "tss_base": self.at("TR", 1)?, "lstar": null,
            "smm": one("SMM")? == 1, "nested_guest": false,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOWN: &str = "\n\nCPU#0\r\nRAX=0000000000000001 RBX=00000000000000b2 RCX=3 RDX=4\nRSI=5 RDI=6 RBP=7 RSP=8\n\
        R8 =0000000000000009 R9 =a R10=b R11=c\nR12=d R13=e R14=f R15=10\n\
        RIP=ffffffff81000000 RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1\n\
        CS =0010 0000000000000000 ffffffff 00af9b00 DPL=0 CS64 [-RA]\nSS =0018 0000000000000000 ffffffff 00cf9300\n\
        FS =0000 0000000000000011 00000000 00000000\nGS =0000 ffff888000000000 00000000 00000000\n\
        TR =0040 fffffe0000003000 00004087 00008b00\nGDT=     fffffe0000001000 0000007f\nIDT=     fffffe0000000000 00000fff\n\
        CR0=80050033 CR2=0000000000000000 CR3=000000000220a000 CR4=000006f0\nEFER=0000000000000d01\n";

    #[test]
    fn registers_segments_and_tables_are_read() {
        let cpus = parse(SHOWN).unwrap();
        assert_eq!(cpus.len(), 1);
        assert_eq!(cpus[0]["general"][3], 0xb2);
        assert_eq!(cpus[0]["general"][8], 9);
        assert_eq!(cpus[0]["gs_base"], 0xffff_8880_0000_0000_u64);
        assert_eq!(cpus[0]["idt_base"], 0xffff_fe00_0000_0000_u64);
        assert_eq!(cpus[0]["tss_base"], 0xffff_fe00_0000_3000_u64);
        assert_eq!(cpus[0]["activity"], "halted");
    }

    #[test]
    fn a_register_that_is_missing_is_named() {
        let error = parse("CPU#0\nRAX=1\n").unwrap_err().to_string();
        assert!(error.contains("RCX") || error.contains("HLT"), "{error}");
    }
}
