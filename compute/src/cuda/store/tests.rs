use super::*;

#[test]
fn names_change_with_what_went_in() {
    let [a, b] = [SOURCES[0], SOURCES[1]];
    let name = file_name(&a, "sm_90a", None);
    assert_eq!(name, file_name(&a, "sm_90a", None));
    let changed = Source { text: b.text, ..a };
    for other in [
        file_name(&b, "sm_90a", None),
        file_name(&a, "sm_100a", None),
        file_name(&a, "sm_90a", Some((13, 0))),
        file_name(&changed, "sm_90a", None),
    ] {
        assert_ne!(name, other);
    }
    assert_ne!(file_name(&a, "sm_90a", Some((13, 0))), file_name(&a, "sm_90a", Some((13, 1))));
}

#[test]
fn a_damaged_file_is_no_kernel() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = folder.path().join("sub/kernel.cubin");
    assert_eq!(read(&path), None);
    write(&path, b"machine code").expect("written");
    assert_eq!(read(&path).as_deref(), Some(&b"machine code"[..]));
    let whole = fs::read(&path).expect("read");
    for broken in [&whole[..whole.len() - 1], &whole[1..], &whole[..3], &[]] {
        fs::write(&path, broken).expect("written");
        assert_eq!(read(&path), None);
    }
    assert_eq!(fs::read_dir(folder.path().join("sub")).expect("folder").count(), 1, "nothing left beside");
}

#[test]
fn a_prebuilt_kernel_needs_no_compiler() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let source = &SOURCES[0];
    write(&folder.path().join(file_name(source, "sm_90a", None)), b"machine code").expect("written");
    let store = KernelStore { prebuilt: Some(folder.path().to_owned()), cache: None };
    let (cubin, origin) = store.find(source, "sm_90a").expect("found");
    assert_eq!((cubin.as_slice(), origin), (&b"machine code"[..], Origin::Prebuilt));
}

#[test]
fn what_is_missing_is_named_and_where_it_was_looked_for() {
    let folder = PathBuf::from("/opt/trireme/kernels");
    let said = CudaError::NoNvrtc { kernel: "norm", looked_in: Some(folder) }.to_string();
    for word in ["NVRTC", "norm", "LD_LIBRARY_PATH", "/opt/trireme/kernels"] {
        assert!(said.contains(word), "{said}");
    }
    let beside = KernelStore::default().prebuilt.expect("a test is a program");
    assert_eq!(beside.file_name().and_then(|name| name.to_str()), Some("kernels"));
    if nvrtc::version().is_none() {
        let store = KernelStore { prebuilt: Some(beside.clone()), cache: None };
        let Err(CudaError::NoNvrtc { looked_in, .. }) = store.find(&SOURCES[0], "sm_90a") else {
            panic!("a kernel without a compiler")
        };
        assert_eq!(looked_in, Some(beside));
    }
}

#[test]
fn work_in_parallel_keeps_its_order() {
    let items: Vec<usize> = (0..100).collect();
    assert_eq!(in_parallel(&items, |item| item * 3), items.iter().map(|item| item * 3).collect::<Vec<_>>());
    assert!(in_parallel(&items[..0], |item| *item).is_empty());
}
