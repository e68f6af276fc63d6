//! CUDA C++ text to a cubin, by the NVRTC library if the machine has one.

use std::ffi::{CString, c_char, c_int};

use cudarc::nvrtc::{result, sys};

use super::CudaError;
use super::kernels::Source;

/// Options that every kernel is compiled with; part of a cached kernel's key.
pub(super) const OPTIONS: &[&str] = &["--std=c++17", "--fmad=false"];

/// NVRTC's version (major, minor), or nothing where there is no such library.
pub fn version() -> Option<(u32, u32)> {
    // SAFETY: looks for a shared library; its initialisers are the CUDA toolkit's.
    if !unsafe { sys::is_culib_present() } {
        return None;
    }
    let (mut major, mut minor): (c_int, c_int) = (0, 0);
    // SAFETY: two out-pointers to live integers.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result().ok()?;
    Some((u32::try_from(major).ok()?, u32::try_from(minor).ok()?))
}

/// A compiled kernel file.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// Machine code, an ELF image.
    pub cubin: Vec<u8>,
    /// Compiler's log: warnings, and with `verbose` registers, shared memory and spills of each entry.
    pub log: String,
}

/// Compiles one kernel file for `architecture` (such as `sm_90a`). No device is needed.
pub fn compile(source: &Source, architecture: &str, verbose: bool) -> Result<Compiled, CudaError> {
    if version().is_none() {
        return Err(CudaError::NoNvrtc { kernel: source.name, looked_in: None });
    }
    let fail = |error: result::NvrtcError, log: String| CudaError::Nvrtc {
        kernel: source.name,
        architecture: architecture.to_owned(),
        error: format!("{error:?}"),
        log,
    };
    let text = CString::new(source.text).expect("kernel text holds no NUL");
    let mut options: Vec<String> = OPTIONS.iter().map(|&option| option.to_owned()).collect();
    options.push(format!("--gpu-architecture={architecture}"));
    if verbose {
        options.push("--ptxas-options=-v".to_owned());
    }
    let program = result::create_program(&text, None).map_err(|error| fail(error, String::new()))?;
    // SAFETY: `program` was just created and is destroyed once, below.
    let outcome = unsafe { result::compile_program(program, &options) };
    // SAFETY: as above; a program has a log after compilation, failed or not.
    let log = unsafe { result::get_program_log(program) }.map(|log| text_of(&log)).unwrap_or_default();
    let compiled = match outcome {
        // SAFETY: the program compiled.
        Ok(()) => unsafe { cubin(program) }
            .map_err(|error| fail(error, log.clone()))
            .map(|cubin| Compiled { cubin, log }),
        Err(error) => Err(fail(error, log)),
    };
    // SAFETY: created above, not used after this.
    let _ = unsafe { result::destroy_program(program) };
    compiled
}

/// # Safety
/// `program` was compiled for a real architecture.
unsafe fn cubin(program: sys::nvrtcProgram) -> Result<Vec<u8>, result::NvrtcError> {
    let mut size = 0usize;
    // SAFETY: the caller's promise; an out-pointer to a live integer.
    unsafe { sys::nvrtcGetCUBINSize(program, &mut size) }.result()?;
    let mut cubin = vec![0u8; size];
    // SAFETY: the buffer has the size that NVRTC asked for.
    unsafe { sys::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast()) }.result()?;
    Ok(cubin)
}

fn text_of(log: &[c_char]) -> String {
    let bytes: Vec<u8> = log.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
