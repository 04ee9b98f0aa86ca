//! CRC-32C (RFC 3720, appendix B.4), PostgreSQL's and ours: reflected, begun and ended with all bits turned.

use crc_fast::{CrcAlgorithm, Digest};

/// Of some bytes.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc32c_append(0, bytes)
}

/// Of what `before` is of, followed by these bytes.
pub fn crc32c_append(before: u32, bytes: &[u8]) -> u32 {
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, u64::from(!before));
    digest.update(bytes);
    digest.finalize() as u32
}

/// Of bytes with one checksum, followed by `len` bytes with another.
pub fn crc32c_combine(before: u32, behind: u32, len: u64) -> u32 {
    crc_fast::checksum_combine(CrcAlgorithm::Crc32Iscsi, before.into(), behind.into(), len) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_standard_s_however_it_is_cut() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(b""), 0);
        let bytes: Vec<u8> = (0..2000u32).map(|i| (i * 7 + i / 256) as u8).collect();
        for cut in [0, 1, 15, 16, 17, 255, 1024, 1999, 2000] {
            let (head, tail) = bytes.split_at(cut);
            assert_eq!(crc32c_append(crc32c(head), tail), crc32c(&bytes), "{cut}");
            let behind = crc32c(tail);
            assert_eq!(crc32c_combine(crc32c(head), behind, tail.len() as u64), crc32c(&bytes), "{cut}");
        }
    }
}
