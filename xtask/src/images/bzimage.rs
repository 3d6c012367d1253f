//! The ELF kernel inside a bzImage. Does not check that it is one that boots.

use std::io::Read;

use anyhow::{Context, Result, bail};

/// Offsets in the real-mode header (Linux v6.12 Documentation/arch/x86/boot.rst, "Details of Header Fields").
const SETUP_SECTS: usize = 0x1f1;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const SECTOR: usize = 512;
/// Frame magics: legacy LZ4 (lz4 doc/lz4_Frame_format.md), zstd (RFC 8878 section 3.1.1), gzip (RFC 1952 section 2.3.1).
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// A legacy block holds at most 8 MiB (lz4 doc/lz4_Frame_format.md, "Legacy frame").
const LZ4_BLOCK: usize = 8 << 20;

/// Unpacks the kernel proper.
pub(super) fn payload(image: &[u8]) -> Result<Vec<u8>> {
    let packed = packed(image).context("not a bzImage of boot protocol 2.08 or later")?;
    // The last 4 bytes repeat the unpacked size, for the boot code.
    let body = &packed[..packed.len().saturating_sub(4)];
    let elf = if packed.starts_with(&LZ4_LEGACY) {
        lz4_legacy(body)?
    } else if packed.starts_with(&ZSTD) {
        zstd(body)?
    } else {
        bail!(
            "the kernel is packed in a way that is not handled (first bytes {:02x?})",
            packed.get(..4)
        );
    };
    if !elf.starts_with(b"\x7fELF") {
        bail!("what was unpacked is not an ELF file");
    }
    Ok(elf)
}

fn packed(image: &[u8]) -> Option<&[u8]> {
    let sectors = match *image.get(SETUP_SECTS)? {
        0 => 4,
        n => usize::from(n),
    };
    let start = (sectors + 1)
        .checked_mul(SECTOR)?
        .checked_add(word(image, PAYLOAD_OFFSET)?)?;
    image.get(start..start.checked_add(word(image, PAYLOAD_LENGTH)?)?)
}

fn word(bytes: &[u8], at: usize) -> Option<usize> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    usize::try_from(u32::from_le_bytes(four.try_into().ok()?)).ok()
}

fn lz4_legacy(body: &[u8]) -> Result<Vec<u8>> {
    let (mut out, mut at) = (Vec::new(), LZ4_LEGACY.len());
    while let Some(size) = word(body, at) {
        let block = body
            .get(at + 4..at + 4 + size)
            .context("an LZ4 block ends beyond the image")?;
        out.extend(lz4_flex::block::decompress(block, LZ4_BLOCK).context("a damaged LZ4 block")?);
        at += 4 + size;
    }
    Ok(out)
}

fn zstd(body: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    ruzstd::decoding::StreamingDecoder::new(body)
        .map_err(|e| anyhow::anyhow!("a damaged zstd frame: {e}"))?
        .read_to_end(&mut out)
        .context("a damaged zstd frame")?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image_around(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0_u8; 2 * SECTOR];
        image[SETUP_SECTS] = 1;
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4]
            .copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    #[test]
    fn blocks_of_a_legacy_lz4_frame_are_joined() {
        let mut packed = LZ4_LEGACY.to_vec();
        for part in [&b"\x7fELF and"[..], b" the rest"] {
            let block = lz4_flex::block::compress(part);
            packed.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
            packed.extend(block);
        }
        packed.extend(18_u32.to_le_bytes());
        assert_eq!(
            payload(&image_around(&packed)).unwrap(),
            b"\x7fELF and the rest"
        );
    }

    #[test]
    fn an_unknown_packing_is_refused() {
        assert!(payload(&image_around(b"\x1f\x8b\x08\0\0\0\0\0")).is_err());
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        assert!(payload(b"MZ").is_err());
    }
}
