//! The contract between the processes, generated from the .proto files of this crate with their comments. It contains
//! no logic.

/// Delivery of events to any service.
pub mod events {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("events.v1");
    }
}

/// Stock.
pub mod inventory {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("inventory.v1");
    }
}

/// Points of customers.
pub mod loyalty {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("loyalty.v1");
    }
}

/// Orders.
pub mod orders {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("orders.v1");
    }
}

/// Operating a relay.
pub mod relay {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("relay.v1");
    }
}

/// The encoded `FileDescriptorSet` of the contract and its imports, for server reflection.
pub const DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("descriptors");
