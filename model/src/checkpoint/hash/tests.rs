use super::*;

#[test]
fn small_tensors_are_read_whole_and_large_ones_from_first_byte_to_last() {
    let bytes: Vec<u8> = (0..=u8::MAX).cycle().take(100_003).collect();
    for len in [0, 1, 63, 64, 255, 256, 257, 258, 259, 1000, 4096, 100_003] {
        let data = &bytes[..len];
        let read: Vec<_> = windows(data).collect();
        if len <= WINDOWS * WINDOW_BYTES {
            assert_eq!(read, [data], "{len} bytes");
            continue;
        }
        assert_eq!(read.len(), WINDOWS, "{len} bytes");
        assert!(read.iter().all(|window| window.len() == WINDOW_BYTES), "{len} bytes");
        let begins: Vec<_> = read.iter().map(|w| w.as_ptr() as usize - data.as_ptr() as usize).collect();
        assert_eq!((begins[0], begins[WINDOWS - 1] + WINDOW_BYTES), (0, len));
        assert!(begins.windows(2).all(|pair| pair[0] + WINDOW_BYTES <= pair[1]), "{len} bytes: {begins:?}");
    }
}
