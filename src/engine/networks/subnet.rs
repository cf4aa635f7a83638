//! Addresses with a common beginning, as engines write them.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use anyhow::{Error, anyhow, bail};
use serde::{Deserialize, Serialize};

/// A subnet: `10.89.7.0/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    address: IpAddr,
    bits: u8,
}

impl Subnet {
    /// The one of an address under a mask.
    pub(super) fn masked(address: IpAddr, mask: IpAddr) -> Subnet {
        let ones = match mask {
            IpAddr::V4(mask) => mask.to_bits().leading_ones(),
            IpAddr::V6(mask) => mask.to_bits().leading_ones(),
        };
        Subnet { address, bits: ones as u8 }
    }

    /// Tells whether an address is in both.
    pub fn overlaps(&self, other: &Subnet) -> bool {
        let bits = u32::from(self.bits.min(other.bits));
        match (self.address, other.address) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                (a.to_bits() ^ b.to_bits()).checked_shr(32 - bits).unwrap_or(0) == 0
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                (a.to_bits() ^ b.to_bits()).checked_shr(128 - bits).unwrap_or(0) == 0
            }
            _ => false,
        }
    }
}

impl FromStr for Subnet {
    type Err = Error;

    fn from_str(text: &str) -> Result<Subnet, Error> {
        let no = || anyhow!("{text:?} is no subnet");
        let (address, bits) = text.split_once('/').ok_or_else(no)?;
        let address: IpAddr = address.parse().map_err(|_| no())?;
        let bits: u8 = bits.parse().map_err(|_| no())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        if bits == 0 || bits > most {
            bail!(no());
        }
        Ok(Subnet { address, bits })
    }
}

impl TryFrom<String> for Subnet {
    type Error = Error;

    fn try_from(text: String) -> Result<Subnet, Error> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> String {
        subnet.to_string()
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_overlap_where_an_address_is_in_both() {
        let subnet = |text: &str| text.parse::<Subnet>().unwrap();
        for (one, other, both) in [
            ("10.89.7.0/24", "10.89.7.0/24", true),
            ("10.89.7.0/24", "10.89.7.128/25", true),
            ("10.89.0.0/16", "10.89.7.9/32", true),
            ("10.89.7.0/24", "10.89.8.0/24", false),
            ("10.89.7.0/24", "fd00::/8", false),
            ("fd00:1::/64", "fd00:1::7/128", true),
            ("fd00:1::/64", "fd00:2::/64", false),
        ] {
            assert_eq!(subnet(one).overlaps(&subnet(other)), both, "{one} {other}");
            assert_eq!(subnet(other).overlaps(&subnet(one)), both, "{other} {one}");
        }
        let of = |address: &str, mask: &str| {
            Subnet::masked(address.parse().unwrap(), mask.parse().unwrap()).to_string()
        };
        assert_eq!(of("10.1.2.3", "255.255.0.0"), "10.1.2.3/16");
        assert_eq!(of("fd00::1", "ffff:ffff:ffff:ffff::"), "fd00::1/64");
    }

    #[test]
    fn what_is_none_is_no_subnet() {
        for odd in ["", "10.1.0.0", "10.1.0.0/0", "10.1.0.0/33", "::/0", "::1/129", "x/8", "--x/8"]
        {
            assert!(odd.parse::<Subnet>().is_err(), "{odd}");
        }
    }
}
