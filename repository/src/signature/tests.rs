use super::*;

const YEAR_US: i64 = 365 * 86_400 * 1_000_000;

fn here() -> RepositoryId {
    RepositoryId([7; 16])
}

fn root() -> Signer {
    Signer::from_seed(&[1; 32])
}

fn trust() -> TrustRoot {
    TrustRoot { repository_id: here(), root_public_key: root().public_key() }
}

fn key() -> Path {
    Path::from("clusters/orders/log/00000000000000000001")
}

fn statement(of: &Signer, role: CertifiedRole) -> WriterStatement {
    WriterStatement {
        repository_id: Some(here()),
        public_key: of.public_key(),
        role,
        name: "db1".to_owned(),
        not_before_us: 0,
        not_after_us: YEAR_US,
    }
}

fn agent_role() -> CertifiedRole {
    CertifiedRole::Agent { clusters: vec!["orders".parse().unwrap()] }
}

fn certified(by: &Signer, seed: u8, role: CertifiedRole) -> Signer {
    let holder = Signer::from_seed(&[seed; 32]);
    let chain = by.chain_below(by.issue(statement(&holder, role)));
    holder.with_chain(chain).unwrap()
}

#[test]
fn root_keeper_and_agent_are_recognised() {
    let keeper = certified(&root(), 2, CertifiedRole::Keeper);
    let agent = certified(&keeper, 3, agent_role());
    let verify = |signer: &Signer| {
        let signed = signer.sign(here(), &key(), b"payload".to_vec());
        trust().verify(&key(), &Signed::decode(&signed.encode()).unwrap()).map(|writer| writer.role)
    };
    assert_eq!(verify(&root()), Ok(Role::Root));
    assert_eq!(verify(&keeper), Ok(Role::Keeper { name: "db1".to_owned() }));
    let clusters = vec!["orders".parse().unwrap()];
    assert_eq!(verify(&agent), Ok(Role::Agent { name: "db1".to_owned(), clusters }));
    assert!(verify(&certified(&root(), 4, agent_role())).is_ok());
}

#[test]
fn no_one_gives_rights_that_he_does_not_have() {
    let keeper = certified(&root(), 2, CertifiedRole::Keeper);
    let agent = certified(&keeper, 3, agent_role());
    let stranger = certified(&Signer::from_seed(&[9; 32]), 4, CertifiedRole::Keeper);
    let below_agent = Signer::from_seed(&[5; 32]);
    let two = vec![agent.issue(statement(&below_agent, agent_role())), agent.chain()[0].clone()];
    let long = agent.chain_below(agent.issue(statement(&below_agent, agent_role())));
    let second_keeper = certified(&keeper, 6, CertifiedRole::Keeper);
    let verify = |signer: &Signer| trust().verify(&key(), &signer.sign(here(), &key(), Vec::new()));
    assert!(matches!(verify(&stranger), Err(SignatureError::Certificate { .. })));
    assert!(matches!(verify(&Signer::from_seed(&[9; 32])), Err(SignatureError::NotRooted { .. })));
    assert!(matches!(verify(&second_keeper), Err(SignatureError::Issuer { .. })));
    assert!(matches!(verify(&below_agent.with_chain(two).unwrap()), Err(SignatureError::Certificate { .. })));
    let direct_agent = certified(&root(), 7, agent_role());
    let under_agent = certified(&direct_agent, 8, agent_role());
    assert!(matches!(verify(&under_agent), Err(SignatureError::Issuer { .. })));
    assert!(matches!(trust().verify_chain(PublicKey([0; 32]), &long), Err(SignatureError::ChainTooLong(3))));
}

#[test]
fn a_signature_holds_for_one_key_and_one_repository() {
    let signed = root().sign(here(), &key(), b"payload".to_vec());
    assert!(trust().verify(&Path::from("clusters/orders/log/00000000000000000002"), &signed).is_err());
    let elsewhere = TrustRoot { repository_id: RepositoryId([8; 16]), ..trust() };
    assert!(elsewhere.verify(&key(), &signed).is_err());
    let agent = certified(&root(), 3, agent_role());
    let signed = agent.sign(RepositoryId([8; 16]), &key(), Vec::new());
    assert!(matches!(elsewhere.verify(&key(), &signed), Err(SignatureError::Repository { .. })));
}

#[test]
fn a_stolen_certificate_is_of_no_use_to_another_key() {
    let agent = certified(&root(), 3, agent_role());
    let thief = Signer::from_seed(&[4; 32]);
    let mut signed = thief.sign(here(), &key(), Vec::new());
    signed.chain = agent.chain().to_vec();
    assert!(matches!(trust().verify(&key(), &signed), Err(SignatureError::Holder { .. })));
    assert!(matches!(thief.with_chain(agent.chain().to_vec()), Err(SignatureError::Holder { .. })));
}

#[test]
fn every_flipped_bit_is_refused() {
    let keeper = certified(&root(), 2, CertifiedRole::Keeper);
    let agent = certified(&keeper, 3, agent_role());
    let body = agent.sign(here(), &key(), b"payload".to_vec()).encode();
    for at in 0..body.len() {
        for bit in 0..8 {
            let mut damaged = body.clone();
            damaged[at] ^= 1 << bit;
            let believed = Signed::decode(&damaged).is_ok_and(|signed| trust().verify(&key(), &signed).is_ok());
            assert!(!believed, "byte {at} bit {bit}");
        }
        let cut = Signed::decode(&body[..at]).is_ok_and(|signed| trust().verify(&key(), &signed).is_ok());
        assert!(!cut, "cut at {at}");
    }
}

#[test]
fn a_writer_is_valid_while_its_whole_chain_is() {
    let keeper = certified(&root(), 2, CertifiedRole::Keeper);
    let agent = Signer::from_seed(&[3; 32]);
    let longer = WriterStatement { not_before_us: 10, not_after_us: 2 * YEAR_US, ..statement(&agent, agent_role()) };
    let chain = keeper.chain_below(keeper.issue(longer));
    let writer = trust().verify_chain(agent.public_key(), &chain).unwrap();
    assert!(!writer.valid_at(9));
    assert!(writer.valid_at(10));
    assert!(writer.valid_at(YEAR_US));
    assert!(!writer.valid_at(YEAR_US + 1), "the keeper's certificate has ended");
    assert!(Writer::root(root().public_key()).valid_at(i64::MAX));
}
