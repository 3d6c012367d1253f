//! What linking and matching ask of a guest: addresses of names, and memory. Owns which names mean what in which object;
//! knows nothing of patches.

use vmpatch_introspect::address::PAGE_SIZE;
use vmpatch_introspect::modules::{Module, ModulePlace};
use vmpatch_introspect::symbols::Symbols;
use vmpatch_introspect::{Gpa, Gva, Kernel, KernelMemory, PhysicalMemory, ReadError};

use super::boot::Facts;
use super::boot::facts::FactsError;
use crate::arena::Loaded;
use crate::patch::VMLINUX;

/// A guest kernel as linking sees it.
pub trait Live {
    /// All addresses of a name in the kernel itself, in the order that livepatch's `sympos` counts.
    fn named(&self, name: &str) -> Vec<Gva>;

    /// All addresses of a name that an object itself defines, in the order that livepatch's `sympos` counts.
    fn defined_in(&self, object: &str, name: &str) -> Vec<Gva>;

    /// All addresses of what code of an object means by a name: those of the object itself, else those of what it may link to:
    /// the kernel, and modules that stay loaded as long as it does.
    fn named_in(&self, object: &str, name: &str) -> Vec<Gva>;

    /// Fills `into` from `at` on.
    ///
    /// # Errors
    /// [`ReadError`]; `into` is then unspecified.
    fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), ReadError>;

    /// Where a byte lies in guest-physical memory.
    ///
    /// # Errors
    /// [`ReadError`].
    fn physical(&self, at: Gva) -> Result<Gpa, ReadError>;

    /// A name for an address, for messages: `vfs_read+0x12`.
    fn describe(&self, at: Gva) -> String;

    /// Whether what lies there is freed once the guest, or a module, has started.
    fn is_init(&self, _at: Gva) -> bool {
        false
    }

    /// The address of a name that has just one.
    fn unique(&self, name: &str) -> Option<Gva> {
        match *self.named(name) {
            [at] => Some(at),
            _ => None,
        }
    }

    /// One little-endian word.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn read_u64(&self, at: Gva) -> Result<u64, ReadError> {
        let mut word = [0; 8];
        self.read(at, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    /// `len` bytes; callers bound `len`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn bytes(&self, at: Gva, len: usize) -> Result<Vec<u8>, ReadError> {
        let mut bytes = vec![0; len];
        self.read(at, &mut bytes)?;
        Ok(bytes)
    }
}

/// A kernel found in a guest.
#[derive(Clone)]
pub struct Guest<'a> {
    kernel: &'a Kernel,
    memory: KernelMemory<'a>,
    modules: &'a [Module],
    places: &'a [ModulePlace],
}

impl<'a> Guest<'a> {
    /// Looks at `kernel` through `physical`.
    #[must_use]
    pub fn new(kernel: &'a Kernel, physical: &'a dyn PhysicalMemory) -> Self {
        Self {
            kernel,
            memory: kernel.memory(physical),
            modules: &[],
            places: &[],
        }
    }

    /// The same kernel with other memory, such as its own beneath what patches did to it.
    #[must_use]
    pub fn over<'b>(&self, physical: &'b dyn PhysicalMemory) -> Guest<'b>
    where
        'a: 'b,
    {
        Guest {
            memory: self.kernel.memory(physical),
            ..self.clone()
        }
    }

    /// The same with its loaded modules.
    #[must_use]
    pub const fn with_modules(self, modules: &'a [Module]) -> Self {
        Self { modules, ..self }
    }

    /// The same with where its loaded modules lie.
    #[must_use]
    pub const fn with_places(self, places: &'a [ModulePlace]) -> Self {
        Self { places, ..self }
    }

    /// A loaded module.
    #[must_use]
    pub fn module(&self, name: &str) -> Option<&'a Module> {
        self.modules.iter().find(|module| module.name == name)
    }

    /// The modules that one uses, and those that they use in turn. Nothing keeps others from being unloaded before it.
    fn used_by(&self, name: &str) -> Vec<&'a Module> {
        let mut used: Vec<_> = self.module(name).into_iter().collect();
        let mut next = 0;
        while let Some(user) = used.get(next) {
            let is_used = |module: &&Module| match &user.uses {
                Some(uses) => uses.contains(&module.at),
                None => true,
            };
            let new: Vec<_> = (self.modules.iter())
                .filter(is_used)
                .filter(|module| !used.iter().any(|other| other.at == module.at))
                .collect();
            used.extend(new);
            next += 1;
        }
        used
    }

    /// The kernel.
    #[must_use]
    pub const fn kernel(&self) -> &'a Kernel {
        self.kernel
    }

    /// Where its modules lie, by which the places of patches are told from what took their place.
    #[must_use]
    pub const fn loaded(&self) -> Loaded<'a> {
        Loaded {
            places: self.places,
            space: Some(self.kernel.layout.space),
        }
    }

    /// What its boot decided, as far as code depends on it.
    ///
    /// # Errors
    /// [`FactsError`].
    pub fn facts(&self) -> Result<Facts, FactsError> {
        let features = self.kernel.cpu_features(self.memory.physical).ok();
        Facts::read(&self.kernel.identity.release, features, self)
    }

    /// Its memory.
    #[must_use]
    pub const fn memory(&self) -> &KernelMemory<'a> {
        &self.memory
    }
}

impl Live for Guest<'_> {
    fn named(&self, name: &str) -> Vec<Gva> {
        self.kernel
            .symbols
            .named(name)
            .map(|symbol| symbol.at)
            .collect()
    }

    /// A module's own names hide those of others, as when it was linked; what it does not define is the kernel's, or another
    /// module's.
    fn named_in(&self, object: &str, name: &str) -> Vec<Gva> {
        let own = self.defined_in(object, name);
        if object == VMLINUX || !own.is_empty() {
            return own;
        }
        // Only what is global can have been linked to: `nm` writes its kind in upper case.
        let kernels = self.kernel.symbols.named(name);
        let global = kernels.filter(|symbol| symbol.kind.is_ascii_uppercase());
        let kernels: Vec<_> = global.map(|symbol| symbol.at).collect();
        if !kernels.is_empty() {
            return kernels;
        }
        let used = self.used_by(object).into_iter();
        used.flat_map(|module| defined(module, name)).collect()
    }

    fn defined_in(&self, object: &str, name: &str) -> Vec<Gva> {
        if object == VMLINUX {
            return self.named(name);
        }
        self.module(object)
            .map_or_else(Vec::new, |module| defined(module, name))
    }

    fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), ReadError> {
        self.memory.read(at, into)
    }

    fn physical(&self, at: Gva) -> Result<Gpa, ReadError> {
        let found = self.memory.space.translate(self.memory.physical, at)?;
        found.map(|it| it.at).ok_or(ReadError::NotMapped(at))
    }

    fn is_init(&self, at: Gva) -> bool {
        let of_modules = self.modules.iter().map(|module| module.init_text);
        let mut all = of_modules.chain([self.kernel.layout.init]).flatten();
        all.any(|init| init.contains(at))
    }

    fn describe(&self, at: Gva) -> String {
        let module = self.modules.iter().find(|it| it.text.contains(at));
        module.map_or_else(
            || describe(&self.kernel.symbols, at),
            |it| format!("{} [{}]", describe(&it.symbols, at), it.name),
        )
    }
}

fn defined(module: &Module, name: &str) -> Vec<Gva> {
    module.symbols.named(name).map(|symbol| symbol.at).collect()
}

/// Symbol and distance, or the bare address.
fn describe(symbols: &Symbols, at: Gva) -> String {
    match symbols.containing(at) {
        Some((symbol, _)) if symbol.at == at => symbol.name.to_owned(),
        Some((symbol, _)) if at.0 - symbol.at.0 < 64 * PAGE_SIZE => {
            format!("{}+{:#x}", symbol.name, at.0 - symbol.at.0)
        }
        _ => at.to_string(),
    }
}
