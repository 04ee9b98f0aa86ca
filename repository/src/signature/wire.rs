//! Signatures and certificates to and from protobuf (`walfleet/repository/v1/signature.proto`).

use prost::Message;
use walfleet_proto::repository::v1 as proto;

use super::{Certificate, CertifiedRole, PublicKey, SignatureError, Signed, WriterStatement};
use crate::ids::RepositoryId;

fn malformed(what: impl ToString) -> SignatureError {
    SignatureError::Malformed { what: what.to_string() }
}

pub(super) fn encode_statement(statement: &WriterStatement) -> Vec<u8> {
    let (role, clusters) = match &statement.role {
        CertifiedRole::Keeper => (proto::WriterRole::Keeper, Vec::new()),
        CertifiedRole::Agent { clusters } => {
            (proto::WriterRole::Agent, clusters.iter().map(|name| name.to_string()).collect())
        }
    };
    let message = proto::WriterStatement {
        repository_id: statement.repository_id.map_or_else(Vec::new, |id| id.0.to_vec()).into(),
        public_key: statement.public_key.0.to_vec().into(),
        role: role.into(),
        name: statement.name.clone(),
        clusters,
        not_before_us: statement.not_before_us,
        not_after_us: statement.not_after_us,
    };
    message.encode_to_vec()
}

fn decode_statement(bytes: &[u8]) -> Result<WriterStatement, SignatureError> {
    let message = proto::WriterStatement::decode(bytes).map_err(malformed)?;
    let role = match proto::WriterRole::try_from(message.role) {
        Ok(proto::WriterRole::Keeper) => CertifiedRole::Keeper,
        Ok(proto::WriterRole::Agent) => {
            let clusters = message.clusters.iter().map(|name| name.parse()).collect::<Result<_, _>>();
            CertifiedRole::Agent { clusters: clusters.map_err(malformed)? }
        }
        Ok(proto::WriterRole::Unspecified) | Err(_) => return Err(malformed("a certificate without a known role")),
    };
    let repository_id = match message.repository_id.as_ref() {
        [] => None,
        bytes => Some(RepositoryId::from_slice(bytes).map_err(malformed)?),
    };
    Ok(WriterStatement {
        repository_id,
        public_key: PublicKey::from_slice(&message.public_key).map_err(malformed)?,
        role,
        name: message.name,
        not_before_us: message.not_before_us,
        not_after_us: message.not_after_us,
    })
}

fn certificate_to_proto(certificate: &Certificate) -> proto::WriterCertificate {
    proto::WriterCertificate {
        statement: certificate.statement.clone().into(),
        signature: certificate.signature.clone().into(),
    }
}

fn certificate_from_proto(message: proto::WriterCertificate) -> Result<Certificate, SignatureError> {
    let claims = decode_statement(&message.statement)?;
    Ok(Certificate { statement: message.statement.into(), signature: message.signature.into(), claims })
}

pub(super) fn encode_certificate(certificate: &Certificate) -> Vec<u8> {
    certificate_to_proto(certificate).encode_to_vec()
}

pub(super) fn decode_certificate(bytes: &[u8]) -> Result<Certificate, SignatureError> {
    certificate_from_proto(proto::WriterCertificate::decode(bytes).map_err(malformed)?)
}

pub(super) fn encode_signed(signed: &Signed) -> Vec<u8> {
    let message = proto::Signed {
        payload: signed.payload.clone().into(),
        signer: signed.signer.0.to_vec().into(),
        signature: signed.signature.clone().into(),
        chain: signed.chain.iter().map(certificate_to_proto).collect(),
    };
    message.encode_to_vec()
}

pub(super) fn decode_signed(body: &[u8]) -> Result<Signed, SignatureError> {
    let message = proto::Signed::decode(body).map_err(malformed)?;
    Ok(Signed {
        signer: PublicKey::from_slice(&message.signer).map_err(malformed)?,
        chain: message.chain.into_iter().map(certificate_from_proto).collect::<Result<_, _>>()?,
        payload: message.payload.into(),
        signature: message.signature.into(),
    })
}
