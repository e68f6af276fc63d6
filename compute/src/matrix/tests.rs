use super::*;

#[test]
fn fp8_scales_multiply_their_block() {
    // 130 rows and columns: the last block of either is two wide.
    let (rows, cols) = (130, 130);
    let codes = vec![0x38u8; rows * cols]; // 1.0
    let matrix = Matrix::fp8(rows, cols, codes.into(), vec![2.0, 3.0, 5.0, 7.0]).expect("lengths fit");
    let weights = matrix.to_f32();
    for (row, col, expected) in
        [(0, 0, 2.0), (127, 127, 2.0), (0, 128, 3.0), (128, 127, 5.0), (129, 129, 7.0)]
    {
        assert_eq!(weights[row * cols + col], expected, "({row}, {col})");
    }
    let mut row = vec![f32::NAN; cols];
    matrix.row_f32(129, &mut row);
    assert_eq!(row, weights[129 * cols..]);
}

#[test]
fn storage_must_fit_the_shape() {
    let weights = |expected, got, unit| MatrixError::Weights { rows: 2, cols: 3, expected, got, unit };
    assert_eq!(Matrix::f32(2, 3, vec![0.0; 5]).expect_err("short"), weights(6, 5, "values"));
    assert_eq!(Matrix::bf16(2, 3, vec![0; 13].into()).expect_err("long"), weights(12, 13, "bytes"));
    assert_eq!(Matrix::fp8(2, 3, vec![0; 5].into(), vec![1.0]).expect_err("short"), weights(6, 5, "bytes"));
    let scales = Matrix::fp8(2, 3, vec![0; 6].into(), vec![]).expect_err("no scales");
    assert_eq!(scales, MatrixError::Scales { rows: 2, cols: 3, expected: 1, got: 0 });
    assert!(Matrix::bf16(usize::MAX, usize::MAX, Bytes::new()).is_err());
    assert!(HeadMatrices::new(2, 3, 4, vec![0.0; 23]).is_err());
}

#[test]
fn head_matrices_lose_nothing_unless_asked_to() {
    let exact = vec![1.0, -0.5, 3.0, 1.5e-3];
    let matrices = HeadMatrices::new(1, 2, 2, exact.clone()).expect("lengths fit");
    assert!(matches!(matrices.storage, HeadStorage::F32(_)), "1.5e-3 is no bf16");
    assert_eq!(matrices.weight(0, 1, 1), 1.5e-3);
    let matrices = HeadMatrices::new(1, 2, 2, vec![1.0, -0.5, 3.0, 0.25]).expect("lengths fit");
    assert!(matches!(matrices.storage, HeadStorage::Bf16(_)));
    assert_eq!(matrices.weight(0, 1, 0), 3.0);
    let rounded = HeadMatrices::rounded_to_bf16(1, 2, 2, &exact).expect("lengths fit");
    assert_eq!(rounded.weight(0, 1, 1), fp8::from_bf16(fp8::to_bf16(1.5e-3)));
}
