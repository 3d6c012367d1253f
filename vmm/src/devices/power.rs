//! The registers by which a guest switches itself off or asks for a reset. Owns their bits; what then
//! happens to the machine is the run loop's.

use crate::bus::{Device, Effect};

/// The sleep type of S5 in the DSDT's `_S5` package and in PM1 control.
pub const S5_SLEEP_TYPE: u8 = 5;

/// PM1 control, bit 0: ACPI owns the power registers (ACPI 6.5, table 4.16, `SCI_EN`). Always set: there
/// is no firmware to hand over from.
const SCI_ENABLED: u8 = 1;
/// PM1 control, second byte, bit 5 (bit 13 of the register): `SLP_EN`.
const SLEEP_ENABLE: u8 = 1 << 5;

/// Offsets into the PM1a block.
const STATUS: usize = 0;
const ENABLE: usize = 2;
const CONTROL: usize = 4;

/// The ACPI PM1a event and control blocks: status (2 bytes), enable (2), control (2); ACPI 6.5, 4.8.3.
#[derive(Debug)]
pub struct PowerManagement {
    registers: [u8; Self::SIZE as usize],
}

impl PowerManagement {
    /// Ports the block takes.
    pub const SIZE: u16 = 6;
    /// Offset of PM1a control in it.
    pub const CONTROL_OFFSET: u16 = CONTROL as u16;

    /// As after power-on: no event pending, none enabled.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            registers: [0, 0, 0, 0, SCI_ENABLED, 0],
        }
    }

    fn write_byte(&mut self, offset: usize, value: u8) {
        let Some(register) = self.registers.get_mut(offset) else {
            return;
        };
        match offset {
            STATUS..ENABLE => *register &= !value,
            ENABLE..CONTROL => *register = value,
            CONTROL => *register = value | SCI_ENABLED,
            _ => *register = value & !SLEEP_ENABLE,
        }
    }
}

impl Default for PowerManagement {
    fn default() -> Self {
        Self::new()
    }
}

impl Device for PowerManagement {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let there = self.registers.get(from..).unwrap_or_default();
        for (into, register) in data.iter_mut().zip(there) {
            *into = *register;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let mut effect = Effect::None;
        for (at, &value) in (offset..u64::from(Self::SIZE)).zip(data) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            self.write_byte(at, value);
            // SLP_TYP is bits 12:10 of the register, so bits 4:2 of the byte that holds SLP_EN.
            if at == CONTROL + 1 && value & SLEEP_ENABLE != 0 && (value >> 2) & 7 == S5_SLEEP_TYPE {
                effect = Effect::PowerOff;
            }
        }
        effect
    }
}

/// The reset control register of a PC chipset, which the FADT names as ACPI's reset register.
#[derive(Debug, Default)]
pub struct ResetControl {
    value: u8,
}

impl ResetControl {
    /// Its port on a PC (Linux v6.12 arch/x86/kernel/reboot.c, `BOOT_CF9_FORCE`).
    pub const PORT: u16 = 0xcf9;
    /// A warm reset of the whole system: `SYS_RST` and `RST_CPU`.
    pub const RESET: u8 = 0b110;
    /// `RST_CPU`: the reset happens when this bit is written as one.
    const RESET_CPU: u8 = 0b100;
}

impl Device for ResetControl {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        if let Some(first) = data.first_mut() {
            *first = self.value;
        }
    }

    fn write(&mut self, _: u64, data: &[u8]) -> Effect {
        let Some(&value) = data.first() else {
            return Effect::None;
        };
        self.value = value & !Self::RESET_CPU;
        if value & Self::RESET_CPU == 0 {
            Effect::None
        } else {
            Effect::Reset
        }
    }
}

/// The command port of a keyboard controller, for the one command that pulses the reset line: where
/// Linux turns when ACPI's reset register did nothing (`BOOT_KBD`).
#[derive(Debug, Default)]
pub struct I8042;

impl I8042 {
    /// Its command and status port.
    pub const PORT: u16 = 0x64;
    /// Pulse the reset line (Linux v6.12 arch/x86/kernel/reboot.c, `BOOT_KBD`).
    const PULSE_RESET: u8 = 0xfe;
}

impl Device for I8042 {
    /// Both buffers empty, so that nobody waits for them.
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _: u64, data: &[u8]) -> Effect {
        if data.first() == Some(&Self::PULSE_RESET) {
            Effect::Reset
        } else {
            Effect::None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control(value: u16) -> Effect {
        PowerManagement::new().write(4, &value.to_le_bytes())
    }

    #[test]
    fn only_sleep_enable_with_the_type_of_s5_switches_off() {
        assert_eq!(control(1 << 13 | 5 << 10), Effect::PowerOff);
        assert_eq!(control(5 << 10), Effect::None);
        assert_eq!(control(1 << 13), Effect::None);
        assert_eq!(control(1 << 13 | 3 << 10), Effect::None);
    }

    #[test]
    fn acpi_mode_cannot_be_left_and_sleep_enable_reads_as_zero() {
        let mut pm = PowerManagement::new();
        assert_eq!(pm.write(4, &[0, 0b0011_0000]), Effect::None);
        let mut data = [0xff; 2];
        pm.read(4, &mut data);
        assert_eq!(data, [1, 0b0001_0000]);
    }

    #[test]
    fn accesses_past_the_block_change_nothing_and_read_as_ones() {
        let mut pm = PowerManagement::new();
        assert_eq!(pm.write(5, &[0; 8]), Effect::None);
        assert_eq!(pm.write(u64::MAX, &[0xff; 8]), Effect::None);
        let mut data = [0xff; 8];
        pm.read(4, &mut data);
        assert_eq!(data, [1, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn the_reset_register_resets_on_the_cpu_bit_only() {
        let mut reset = ResetControl::default();
        assert_eq!(reset.write(0, &[0b010]), Effect::None);
        assert_eq!(reset.write(0, &[ResetControl::RESET]), Effect::Reset);
        assert_eq!(reset.write(0, &[]), Effect::None);
    }

    #[test]
    fn the_keyboard_controller_knows_one_command() {
        assert_eq!(I8042.write(0, &[0xfe]), Effect::Reset);
        assert_eq!(I8042.write(0, &[0xaa]), Effect::None);
        let mut status = [0xff];
        I8042.read(0, &mut status);
        assert_eq!(status, [0]);
    }
}
