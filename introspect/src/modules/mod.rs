//! Loaded modules: where their text lies, their symbols, their unwind tables.

pub(crate) mod read;

use serde::{Deserialize, Serialize};

use crate::address::{Gva, GvaRange};
use crate::symbols::Symbols;

/// What a module is doing (`enum module_state`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModuleState {
    /// Normal.
    Live,
    /// Running its init function.
    Coming,
    /// Being removed.
    Going,
    /// Still being set up: not to be looked at.
    Unformed,
}

/// One loaded module.
#[derive(Debug)]
pub struct Module {
    /// `struct module` itself.
    pub at: Gva,
    /// Name.
    pub name: String,
    /// State.
    pub state: ModuleState,
    /// Core text.
    pub text: GvaRange,
    /// Init text, where it has not been freed.
    pub init_text: Option<GvaRange>,
    /// The modules that it uses, by their `struct module`: none of them can be unloaded before it. `None` where the kernel
    /// does not keep book of that, for it unloads none (`CONFIG_MODULE_UNLOAD`).
    pub uses: Option<Vec<Gva>>,
    /// Its symbols (`mod->kallsyms`).
    pub symbols: Symbols,
    /// ORC ip table and entry table, with the number of entries, where the kernel has ORC.
    pub orc: Option<ModuleOrc>,
}

/// Where a module's code and unwind tables lie: all that unwinding through it rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModulePlace {
    /// `struct module` itself.
    pub at: Gva,
    /// State.
    pub state: ModuleState,
    /// Core text; empty while the module is still being set up.
    pub text: GvaRange,
    /// Init text, where it has not been freed.
    pub init_text: Option<GvaRange>,
    /// Its unwind tables.
    pub orc: Option<ModuleOrc>,
}

impl Module {
    /// Where its code and unwind tables lie.
    #[must_use]
    pub const fn place(&self) -> ModulePlace {
        ModulePlace {
            at: self.at,
            state: self.state,
            text: self.text,
            init_text: self.init_text,
            orc: self.orc,
        }
    }
}

/// Where a module's unwind tables lie (`mod->arch`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleOrc {
    /// `orc_unwind_ip`: i32 offsets, each from its own place.
    pub ips: Gva,
    /// `orc_unwind`: 6-byte entries.
    pub entries: Gva,
    /// How many.
    pub count: u32,
}
