//! ARCHITECTURE.md's two tables held against the code: who imports whom, and one file per hop.
//!
//! The tables are read out of the document itself, so that neither can drift from the other.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the workspace")
}

/// The rows of the table that follows `heading`, cells trimmed, back ticks kept.
fn table(heading: &str) -> Vec<Vec<String>> {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let (_, after) = text.split_once(heading).unwrap_or_else(|| panic!("ARCHITECTURE.md has no {heading:?}"));
    after
        .lines()
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'))
        .skip(2)
        .map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect())
        .collect()
}

/// What stands between back ticks in a cell.
fn quoted(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn workspace_members() -> BTreeSet<String> {
    let manifest: toml::Table =
        fs::read_to_string(root().join("Cargo.toml")).expect("manifest").parse().expect("TOML");
    let members = manifest["workspace"]["members"].as_array().expect("members");
    members.iter().map(|m| m.as_str().expect("a name").to_owned()).collect()
}

fn imports(member: &str) -> BTreeSet<String> {
    let manifest: toml::Table =
        fs::read_to_string(root().join(member).join("Cargo.toml")).expect("manifest").parse().expect("TOML");
    let members = workspace_members();
    let dependencies = manifest["dependencies"].as_table().expect("dependencies");
    dependencies.keys().filter(|name| members.contains(*name)).cloned().collect()
}

#[test]
fn crates_import_only_what_the_table_allows() {
    let mut allowed = BTreeMap::new();
    for row in table("## Code map") {
        let name = quoted(&row[0])[0].trim_end_matches('/').to_owned();
        allowed.insert(name, row[2].clone());
    }
    let members = workspace_members();
    assert_eq!(
        allowed.keys().cloned().collect::<BTreeSet<_>>(),
        members,
        "the table lists every crate, once"
    );
    for (member, cell) in &allowed {
        let may: BTreeSet<String> = match cell.as_str() {
            "all" => members.clone(),
            "all but trireme" => members.iter().filter(|m| *m != "trireme").cloned().collect(),
            list => quoted(list).into_iter().collect(),
        };
        let does = imports(member);
        assert!(does.is_subset(&may), "{member} imports {does:?}, the table allows {may:?}");
    }
}

#[test]
fn every_hop_has_its_file_and_opens_its_span() {
    let rows = table("## A request's way");
    assert_eq!(rows.len(), 12, "twelve hops");
    for row in rows {
        let hop = &row[0];
        let spans = quoted(&row[1]).iter().any(|file| {
            let text =
                fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("hop {hop}, {file}: {e}"));
            text.contains(&format!("hop = {hop}"))
        });
        assert!(spans, "no file of hop {hop} opens a span with `hop = {hop}`");
    }
}

#[test]
fn unsafe_stays_where_it_is_argued() {
    let may = ["compute/", "fabric/", "model/src/checkpoint/map.rs"];
    for file in sources() {
        let relative = file.strip_prefix(root()).expect("inside").display().to_string();
        let text = fs::read_to_string(&file).expect("source");
        let code =
            text.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n");
        let uses = ["unsafe {", "unsafe fn", "unsafe impl"].iter().any(|form| code.contains(form));
        if uses && !relative.ends_with("architecture.rs") {
            assert!(may.iter().any(|prefix| relative.starts_with(prefix)), "{relative} has unsafe code");
        }
    }
}

#[test]
fn no_folder_is_a_drawer() {
    let drawers = ["common", "utils", "util", "helpers", "misc"];
    for member in workspace_members() {
        // A module may be the core of something; a crate of that name is a drawer.
        assert!(member != "core" && !drawers.contains(&member.as_str()), "{member}");
    }
    for file in sources() {
        let relative = file.strip_prefix(root()).expect("inside").to_owned();
        for part in relative.iter().map(|p| p.to_string_lossy().trim_end_matches(".rs").to_owned()) {
            assert!(!drawers.contains(&part.as_str()), "{relative:?}");
        }
    }
}

fn sources() -> Vec<PathBuf> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    for member in workspace_members() {
        for folder in ["src", "tests", "examples", "benches"] {
            walk(&root().join(&member).join(folder), &mut found);
        }
    }
    assert!(found.len() > 50, "the walk found the sources");
    found
}
