use super::TraceContext;

const EXAMPLE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

#[test]
fn round_trips_the_standards_example() {
    let context = TraceContext::parse(EXAMPLE).expect("the standard's own example");
    assert_eq!(context.to_string(), EXAMPLE);
    assert_eq!(context.trace_id(), "0af7651916cd43dd8448eb211c80319c");
}

#[test]
fn a_child_keeps_the_trace_and_changes_the_span() {
    let parent = TraceContext::root();
    let child = parent.child();
    assert_eq!(child.trace_id(), parent.trace_id());
    assert_ne!(child, parent);
    assert_eq!(TraceContext::parse(&child.to_string()), Some(child));
}

#[test]
fn malformed_headers_are_none() {
    let cases = [
        "",
        "00",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
        "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c8031é-b7ad6b7169203331-01",
        "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    ];
    for header in cases {
        assert_eq!(TraceContext::parse(header), None, "{header:?}");
    }
}

#[test]
fn a_later_version_may_carry_more() {
    let later = EXAMPLE.replacen("00-", "01-", 1) + "-more";
    assert_eq!(TraceContext::parse(&later).map(|context| context.to_string()), Some(EXAMPLE.to_owned()));
}
