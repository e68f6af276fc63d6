use super::*;

fn refused_field(change: impl FnOnce(&mut Limits)) -> Option<&'static str> {
    let mut limits = Limits::default();
    change(&mut limits);
    match limits.validate() {
        Ok(()) => None,
        Err(FabricError::Limits { field, .. }) => Some(field),
        Err(other) => panic!("unexpected error {other}"),
    }
}

#[test]
fn the_default_holds_its_own_rules() {
    assert_eq!(refused_field(|_| ()), None);
}

#[test]
fn each_broken_rule_names_its_field() {
    assert_eq!(refused_field(|l| l.send_frames_max = 0), Some("send_frames_max"));
    assert_eq!(refused_field(|l| l.peers_max = 0), Some("peers_max"));
    assert_eq!(refused_field(|l| l.receive_bytes_max = l.body_bytes_max), Some("receive_bytes_max"));
    assert_eq!(refused_field(|l| l.receive_bytes_max = 1 << 32), Some("receive_bytes_max"));
    assert_eq!(refused_field(|l| l.in_flight_bytes_max = 65_507), Some("in_flight_bytes_max"));
}
