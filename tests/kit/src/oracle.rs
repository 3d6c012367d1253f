//! What the guest's own kernel says of its symbols, tasks and stacks, as init's `oracle` prints it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};

/// The guest's own answers.
#[derive(Clone, Debug, Default)]
pub struct Oracle {
    /// How many symbols of vmlinux /proc/kallsyms has.
    pub symbols: u64,
    /// SHA-256 of their sorted lines "address type name".
    pub symbols_digest: String,
    /// Addresses of a few symbols.
    pub known: BTreeMap<String, u64>,
    /// Lines "address type name" of the planted module.
    pub module_symbols: BTreeSet<String>,
    /// "code", "rodata", "data", "bss": first and last byte in physical memory.
    pub ranges: BTreeMap<String, (u64, u64)>,
    /// Thread id and name of every thread.
    pub tasks: BTreeMap<i64, String>,
    /// Frames of planted kthreads by thread id, innermost first, as "function+0xoffset".
    pub stacks: BTreeMap<i64, Vec<String>>,
}

impl Oracle {
    /// Reads the lines between boot and `@oracle-end`.
    ///
    /// # Errors
    /// A line does not have its form.
    pub fn parse(lines: &[String]) -> Result<Self> {
        let mut oracle = Self::default();
        for line in lines {
            let Some((kind, rest)) = line.strip_prefix('@').and_then(|l| l.split_once(' ')) else {
                continue;
            };
            oracle
                .take(kind, rest)
                .with_context(|| format!("cannot understand the guest's line {line:?}"))?;
        }
        Ok(oracle)
    }

    /// Whether the address lies in the text of the scheduler or of spinning locks, which /proc/PID/stack leaves out
    /// (Linux v6.12 kernel/sched/core.c, `in_sched_functions`).
    #[must_use]
    pub fn is_sleeping_code(&self, at: u64) -> bool {
        ["__sched_text", "__lock_text", "__spinlock_text"].iter().any(|section| {
            let end = |which: &str| self.known.get(&format!("{section}_{which}"));
            matches!((end("start"), end("end")), (Some(start), Some(end)) if (*start..*end).contains(&at))
        })
    }

    fn take(&mut self, kind: &str, rest: &str) -> Result<()> {
        match kind {
            "kallsyms" => {
                let (count, digest) = rest.split_once(' ').context("no digest")?;
                self.symbols = count.parse()?;
                digest.clone_into(&mut self.symbols_digest);
            }
            "symbol" => {
                let mut words = rest.split_whitespace();
                let address = u64::from_str_radix(words.next().context("no address")?, 16)?;
                let name = words.nth(1).context("no name")?;
                self.known.insert(name.to_owned(), address);
            }
            "module-symbol" => drop(self.module_symbols.insert(rest.to_owned())),
            "range" => {
                let words: Vec<&str> = rest.split(' ').collect();
                let [name, first, last] = words[..] else {
                    bail!("not three words")
                };
                let range = (
                    u64::from_str_radix(first, 16)?,
                    u64::from_str_radix(last, 16)?,
                );
                self.ranges.insert(name.to_owned(), range);
            }
            "task" => {
                let (tid, name) = rest.split_once(' ').context("no name")?;
                self.tasks.insert(tid.parse()?, name.to_owned());
            }
            "stack" => {
                let (tid, frames) = stack(rest).context("no frames")?;
                self.stacks.insert(tid.parse()?, frames);
            }
            _ => {}
        }
        Ok(())
    }
}

/// "147 vmp_sleep|f+0x10/0x20 [planted]|g+0x1/0x2" without sizes and module names.
fn stack(text: &str) -> Option<(&str, Vec<String>)> {
    let (head, frames) = text.split_once('|')?;
    let tid = head.split(' ').next()?;
    let frame = |f: &str| f.split('/').next().unwrap_or(f).to_owned();
    Some((tid, frames.split('|').map(frame).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schedulers_section_is_known_by_its_ends() {
        let lines = [
            "@symbol 1000 T __sched_text_start",
            "@symbol 2000 T __sched_text_end",
        ];
        let oracle = Oracle::parse(&lines.map(str::to_owned)).unwrap();
        assert!(oracle.is_sleeping_code(0x1000) && !oracle.is_sleeping_code(0x2000));
    }

    #[test]
    fn the_guests_own_words_are_read() {
        let lines = [
            "@kallsyms 3 abcd",
            "@symbol ffffffff81000000 T _text",
            "@module-symbol ffffffffc0000000 t vmp_chain_5",
            "@range code 01000000 01ffffff",
            "@task 12 kworker/u8:0-events unbound",
            "@stack 149 vmp_sleep|vmp_sleep_inner+0x14/0x20 [planted]|kthread+0xd2/0x100",
            "@oracle-end",
        ];
        let oracle = Oracle::parse(&lines.map(str::to_owned)).unwrap();
        assert_eq!(oracle.symbols, 3);
        assert_eq!(oracle.known["_text"], 0xffff_ffff_8100_0000);
        assert_eq!(oracle.ranges["code"], (0x100_0000, 0x1ff_ffff));
        assert_eq!(oracle.module_symbols.len(), 1);
        assert_eq!(oracle.tasks[&12], "kworker/u8:0-events unbound");
        assert_eq!(
            oracle.stacks[&149],
            ["vmp_sleep_inner+0x14", "kthread+0xd2"]
        );
    }
}
