use super::*;

fn tokens(n: u32) -> Vec<TokenId> {
    (0..n).map(TokenId).collect()
}

#[test]
fn whole_blocks_alone_have_a_hash() {
    for (n, blocks) in [(0, 0), (63, 0), (64, 1), (127, 1), (128, 2)] {
        assert_eq!(block_hashes(0, &tokens(n), 64).len(), blocks, "{n} tokens");
    }
    assert_eq!(block_hashes(0, &tokens(64), 0), []);
}

#[test]
fn a_longer_prompt_begins_with_the_hashes_of_its_prefix() {
    let long = block_hashes(5, &tokens(300), 64);
    assert_eq!(block_hashes(5, &tokens(200), 64), long[..3]);
}

#[test]
fn a_hash_stands_for_everything_before_it() {
    let base = block_hashes(5, &tokens(256), 64);
    for changed in [0, 63, 64, 200] {
        let mut other = tokens(256);
        other[changed] = TokenId(9999);
        let other = block_hashes(5, &other, 64);
        for (block, (a, b)) in base.iter().zip(&other).enumerate() {
            assert_eq!(a == b, block < changed / 64, "token {changed}, block {block}");
        }
    }
    let repeated = block_hashes(5, &[TokenId(7); 256], 64);
    assert!(repeated.windows(2).all(|pair| pair[0] != pair[1]), "position is part of the hash");
}

#[test]
fn salts_share_nothing() {
    let (a, b) = (block_hashes(1, &tokens(256), 64), block_hashes(2, &tokens(256), 64));
    assert!(a.iter().all(|hash| !b.contains(hash)));
}

#[test]
fn a_digest_stands_for_salt_and_tokens() {
    let all = |salt, tokens: &[TokenId]| -> Vec<BlockDigest> {
        let mut digest = BlockDigest::root(salt);
        let next = |block: &[TokenId]| {
            digest = digest.extend(block);
            digest
        };
        tokens.chunks_exact(64).map(next).collect()
    };
    let base = all(5, &tokens(256));
    assert_eq!(all(5, &tokens(150)), base[..2]);
    assert!(all(6, &tokens(256)).iter().all(|digest| !base.contains(digest)), "salts share nothing");
    let mut other = tokens(256);
    other[70] = TokenId(9999);
    let same: Vec<_> = base.iter().zip(all(5, &other)).map(|(a, b)| *a == b).collect();
    assert_eq!(same, [true, false, false, false]);
}
