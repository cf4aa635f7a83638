//! Addresses that an engine gives as it likes: in docker's default network none can be asked for.
//!
//! Where the container has been given another one, connections of home's still have the old one. It stays on
//! the loopback device, as long as they are forwarded, and the engine's bridge hears nothing of it: another
//! container may have it there.

use std::net::IpAddr;

use crate::network::image::{Address, NetworkImage};
use crate::network::read::address;
use crate::network::restore::address_request;
use crate::network::rtnl::{self, Rtnl, index_at};
use crate::network::sysctl;
use crate::problem::{Problem, Trying};
use crate::sys::netns::NetNs;

/// Of the loopback device in every namespace.
const LOOPBACK: i32 = 1;
/// An answer on ARP only for an address of the link that is asked on, and questions only in the name of
/// one: the kernel's ip-sysctl page.
const QUIET: [(&str, &str); 2] = [("arp_ignore", "1"), ("arp_announce", "2")];

/// The image with the addresses that its links have been given.
///
/// # Errors
/// When the namespace cannot be read.
pub fn as_made(
    image: &NetworkImage,
    given: &[IpAddr],
    container: &NetNs,
) -> Result<NetworkImage, Problem> {
    let mut made = image.clone();
    let trying = || "cannot look at the network that the engine has made".to_owned();
    let (links, addresses) =
        Rtnl::open(container).and_then(|mut s| Ok((s.links()?, s.addresses()?))).trying(trying)?;
    for link in &mut made.links {
        if link.addresses.iter().all(|a| !given.contains(&a.local)) {
            continue;
        }
        let index = links.iter().find(|l| l.name == link.name).map(|l| l.index);
        let own = addresses.iter().filter(|m| index.is_some() && index_at(m, 4) == index);
        link.addresses = own.filter_map(address).filter(|a| a.local.is_ipv4()).collect();
    }
    Ok(made)
}

/// The addresses of one that the other does not have.
pub fn lost(old: &NetworkImage, new: &NetworkImage) -> Vec<IpAddr> {
    let all = |image: &NetworkImage| -> Vec<IpAddr> {
        image.outward().flat_map(|(_, link)| &link.addresses).map(|a| a.local).collect()
    };
    let kept = all(new);
    all(old).into_iter().filter(|ip| ip.is_ipv4() && !kept.contains(ip)).collect()
}

/// Nobody on the links of an image is to hear of addresses of the loopback device.
///
/// # Errors
/// When the kernel does not take it.
pub fn silence(image: &NetworkImage, container: &NetNs) -> Result<(), Problem> {
    let trying = || "cannot keep the container's old address to itself".to_owned();
    for (_, link) in image.outward() {
        for (name, value) in QUIET {
            let path = format!("ipv4/conf/{}/{name}", link.name);
            let set = container.run(|| sysctl::set(&path, value, true));
            set.and_then(|done| done).trying(trying)?;
        }
    }
    Ok(())
}

/// Returns which of these the loopback device has.
///
/// # Errors
/// When the namespace cannot be read.
pub fn kept(given: &[IpAddr], container: &NetNs) -> Result<Vec<IpAddr>, Problem> {
    let trying = || "cannot read the container's addresses".to_owned();
    let all = Rtnl::open(container).and_then(|mut s| s.addresses()).trying(trying)?;
    let own = all.iter().filter(|m| index_at(m, 4) == Some(LOOPBACK)).filter_map(address);
    Ok(own.map(|a| a.local).filter(|ip| given.contains(ip)).collect())
}

/// Takes them off it.
///
/// # Errors
/// When one stays.
pub fn forget(old: &[IpAddr], container: &NetNs) -> Result<(), Problem> {
    let trying = || "cannot take the container's old address away".to_owned();
    let mut links = Rtnl::open(container).trying(trying)?;
    for ip in old {
        let request = address_request(rtnl::DELADDR, 0, LOOPBACK, &alone(*ip));
        links.change(&request).trying(trying)?;
    }
    Ok(())
}

/// An address that brings no network along.
pub fn alone(ip: IpAddr) -> Address {
    let prefix = match ip {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    };
    Address::plain(ip, prefix)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::image::tests::sample;

    #[test]
    fn what_was_given_anew_is_lost() {
        let old: NetworkImage = serde_json::from_value(sample()).unwrap();
        let mut new = old.clone();
        assert_eq!(lost(&old, &new), Vec::<IpAddr>::new());
        let mut before = Vec::new();
        for link in &mut new.links {
            before.extend(link.addresses.iter().map(|a| a.local));
            link.addresses = vec![alone("172.17.0.9".parse().unwrap())];
        }
        before.retain(|ip| ip.is_ipv4());
        assert_eq!(lost(&old, &new), before);
    }
}
