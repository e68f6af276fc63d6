use super::*;

#[test]
fn a_kernels_fault_is_told_from_a_call_that_fails() {
    let failed = |code| Err::<(), _>(DriverError(code)).doing("copy to the device").expect_err("it failed");
    let fault = failed(CUresult::CUDA_ERROR_LAUNCH_FAILED);
    assert!(matches!(fault, CudaError::Fault { .. }));
    assert_eq!(fault.to_string(), "a kernel faulted; the driver said so when asked to copy to the device");
    assert!(matches!(failed(CUresult::CUDA_ERROR_INVALID_VALUE), CudaError::Driver { .. }));
    let launch = |code| not_launched("norm_rows", DriverError(code)).to_string();
    assert_eq!(
        launch(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS),
        "a kernel faulted; the driver said so when asked to launch norm_rows"
    );
    assert_eq!(launch(CUresult::CUDA_ERROR_INVALID_VALUE), "kernel norm_rows cannot be launched");
}
