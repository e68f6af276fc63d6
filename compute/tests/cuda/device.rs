//! Opening, compiling, the kernel cache, memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::{fs, thread};

use compute::cuda::{CudaError, Device, KernelStore, Matrix, SOURCES, Uploads, nvrtc};

use super::support::{device, read};

#[test]
fn a_machine_without_the_device_gets_an_error() {
    let Err(error) = Device::open(9999) else { panic!("a machine with ten thousand GPUs") };
    assert!(error.is_absence(), "{error}");
    assert!(matches!(error, CudaError::NoDriver { .. } | CudaError::NoDevice { ordinal: 9999, .. }));
    println!("{error}");
}

#[test]
#[ignore = "needs NVRTC"]
fn every_kernel_compiles() {
    assert!(nvrtc::version().is_some(), "no NVRTC library");
    for source in SOURCES {
        for architecture in ["sm_89", "sm_90a"] {
            let compiled = nvrtc::compile(source, architecture, false).unwrap_or_else(|e| panic!("{e}"));
            assert!(compiled.cubin.starts_with(b"\x7FELF"), "{}", source.name);
        }
    }
    let [first, ..] = SOURCES else { panic!("no kernels") };
    let broken = compute::cuda::Source { text: "this is no kernel", ..*first };
    let Err(CudaError::Nvrtc { log, .. }) = nvrtc::compile(&broken, "sm_90a", false) else {
        panic!("nonsense compiled")
    };
    assert!(log.contains("error"), "{log}");
}

#[test]
#[ignore = "needs a CUDA device"]
fn kernels_are_kept_and_a_damaged_one_is_replaced() {
    let architecture = device().architecture();
    let folder = tempfile::tempdir().expect("temporary folder");
    let store = KernelStore { prebuilt: None, cache: Some(folder.path().to_owned()) };
    let contents = || {
        let mut files: Vec<_> = fs::read_dir(folder.path())
            .expect("folder")
            .map(|entry| entry.expect("entry").path())
            .map(|path| (fs::read(&path).expect("file"), path))
            .collect();
        files.sort_by(|a, b| a.1.cmp(&b.1));
        files
    };
    drop(Device::open_with(0, &store).expect("compiled"));
    let kept = contents();
    assert_eq!(kept.len(), SOURCES.len());
    fs::write(&kept[0].1, &kept[0].0[..100]).expect("damaged");
    drop(Device::open_with(0, &store).expect("one compiled, the others kept"));
    assert!(contents()[0].0.len() > 100, "the damaged one was written anew");
    let folder = tempfile::tempdir().expect("temporary folder");
    KernelStore::build(folder.path(), architecture, |_, _| {}).expect("built");
    let store = KernelStore { prebuilt: Some(folder.path().to_owned()), cache: None };
    Device::open_with(0, &store).expect("taken from the folder");
}

#[test]
#[ignore = "needs a CUDA device"]
fn memory_is_copied_and_runs_out() {
    let device = device();
    let values: Vec<u32> = (0..1000).collect();
    let mut buffer = device.upload(&values).expect("upload");
    device.copy_in(&[7; 10], &mut buffer.slice_mut(5..15)).expect("copy");
    let back = read(device, buffer.slice(3..17));
    assert_eq!(back, [3, 4, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 15, 16]);
    assert!(read(device, device.upload::<u8>(&[]).expect("nothing").view()).is_empty());
    let (_, total) = device.memory().expect("asked");
    let Err(CudaError::OutOfMemory { requested, total: stated, .. }) = device.alloc::<u8>(2 * total) else {
        panic!("twice the memory there is")
    };
    assert_eq!((requested, stated), (2 * total, total));
    device.upload(&values).expect("still usable");
}

#[test]
#[ignore = "needs a CUDA device"]
fn uploads_bring_every_byte() {
    let device = device();
    // Matrices of less than a slot, of several, and of nothing, more of them than there are threads.
    let sizes = [(1, 1), (3, 5_000_011), (0, 7), (1000, 1001), (4096, 4096), (1, 4 << 20), (2, 4 << 20)];
    let bytes = |seed: usize, len: usize| -> Vec<u8> {
        (0..len).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 7) as u8).collect()
    };
    for threads in [1, 3] {
        let mut uploads = Uploads::new(device, threads).expect("threads");
        let mut there: Vec<(Matrix, Vec<u8>)> = Vec::new();
        for (seed, &(rows, cols)) in sizes.iter().enumerate() {
            let values = bytes(seed, 2 * rows * cols);
            let matrix = compute::Matrix::bf16(rows, cols, values.clone().into()).expect("a matrix");
            there.push((Matrix::new_later(device, &matrix, &mut uploads).expect("asked for"), values));
        }
        let sum: usize = there.iter().map(|(_, values)| values.len()).sum();
        assert_eq!(uploads.finish().expect("copied"), sum as u64);
        for (matrix, values) in &mut there {
            assert!(read(device, matrix.parts_mut().0.view()) == *values, "{} bytes", values.len());
        }
        // Given up half way, with the memory gone: nothing is written where others may be.
        let mut uploads = Uploads::new(device, threads).expect("threads");
        let matrix = compute::Matrix::bf16(4096, 4096, bytes(9, 2 << 24).into()).expect("a matrix");
        drop(Matrix::new_later(device, &matrix, &mut uploads).expect("asked for"));
        drop(uploads);
        device.synchronize().expect("still usable");
    }
}

/// As with prefill and decode in one process on one GPU.
#[test]
#[ignore = "needs a CUDA device"]
fn recording_does_not_mind_what_another_device_frees() {
    let device = device();
    let other = Device::open(0).expect("the same GPU again");
    let values = device.upload(&[1.0f32; 1000]).expect("upload");
    let mut sums = device.upload(&[0.0f32; 1000]).expect("upload");
    let recorded = AtomicBool::new(false);
    thread::scope(|scope| {
        let frees = scope.spawn(|| {
            while !recorded.load(Ordering::Relaxed) {
                drop(other.pinned::<u8>(4096).expect("page-locked memory"));
                drop(other.alloc::<u8>(4096).expect("memory"));
            }
        });
        for _ in 0..300 {
            let graph = device.record(|| {
                (0..100).try_for_each(|_| device.add_in_place(&mut sums.view_mut(), values.view()))
            });
            device.replay(&graph.expect("recorded")).expect("replayed");
        }
        recorded.store(true, Ordering::Relaxed);
        frees.join().expect("no failure there either");
    });
    assert_eq!(read(device, sums.view()), [30_000.0; 1000]);
}
