//! Networks: bridges, names, ports, and what is connected while a container runs.

use super::case::{Chapter, Group, Place, differs, same};

pub const CHAPTER: Chapter = Chapter { title: "Networks", groups: GROUPS };

const GROUPS: &[Group] = &[
    Group {
        name: "bridge",
        before: "",
        place: Place::Container(
            "--add-host db:10.9.8.7 --dns 9.9.9.9 --dns-search example.org --dns-option ndots:2",
        ),
        after: "",
        cases: &[
            same(
                "interfaces are lo and eth0",
                "ls /sys/class/net; cat /sys/class/net/eth0/mtu /sys/class/net/eth0/operstate",
            ),
            same(
                "addresses and routes are Docker's",
                "ip -4 -o addr show | sed -E 's/[0-9]+(\\.[0-9]+){3}/N/g; s/^[0-9]+//; s/  +/ /g' | cut -d' ' -f 2-5; ip route | sed -E 's/[0-9]+(\\.[0-9]+){3}/N/g'",
            ),
            same("name servers, search list and options are the user's", "cat /etc/resolv.conf"),
            same(
                "--add-host is in /etc/hosts",
                "grep -w db /etc/hosts; grep -c $(hostname) /etc/hosts; grep localhost /etc/hosts",
            ),
            same(
                "the gateway answers",
                "ping -c 1 -W 20 172.17.0.1 | grep -c '1 packets received'",
            ),
            same(
                "loopback works",
                "(echo hello | nc -l -p 99 &) ; sleep 1; nc 127.0.0.1 99 < /dev/null; ping -c 1 127.0.0.1 | grep -c 'packets received'",
            ),
            same(
                "network parameters are Docker's",
                "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range",
            ),
            differs(
                "a container's kernel forwards packets as the host's does",
                "cat /proc/sys/net/ipv4/ip_forward",
                "0",
                "the guest's kernel forwards nothing unless it is told to: `--sysctl net.ipv4.ip_forward=1`",
            ),
            same(
                "an unreachable host is refused as usual",
                "nc -w 3 172.17.0.1 9 < /dev/null; echo $?",
            ),
        ],
    },
    Group {
        name: "none",
        before: "",
        place: Place::Container("--network none"),
        after: "",
        cases: &[same(
            "--network none leaves loopback",
            "ls /sys/class/net; ip route; ping -c 1 127.0.0.1 | grep -c 'packets received'; wget -T 2 -O- http://172.17.0.1/; echo $?",
        )],
    },
    Group {
        name: "ports",
        place: Place::Host,
        before: r#"
run -d --name $name -p $port:80 -p 127.0.0.1:$((port+1)):81 -p $((port+2)):7/udp busybox sh -c 'mkdir /www; echo served > /www/index.html; head -c 5000000 /dev/zero | tr "\0" z > /www/f; httpd -p 81 -h /www; httpd -p 80 -h /www; echo up; while :; do nc -u -l -p 7 -e cat; done' >/dev/null; logged $name up"#,
        after: "docker rm -f $name >/dev/null",
        cases: &[
            same(
                "published TCP ports are reached on IPv4 and IPv6",
                "eventually curl -sf http://127.0.0.1:$port/; curl -s http://127.0.0.1:$port/; curl -s http://127.0.0.1:$((port+1))/; curl -gs 'http://[::1]:'$port/",
            ),
            same(
                "published UDP ports are reached",
                r#"
perl -MIO::Socket::INET -e 'for (1..60) { my $s = IO::Socket::INET->new(Proto => "udp", PeerAddr => "127.0.0.1:$ARGV[0]"); send $s, "datagram\n", 0; my $r = ""; vec($r, fileno($s), 1) = 1; if (select($r, undef, undef, 1)) { if (defined recv $s, my $d, 99, 0) { print $d; exit } } } print "nothing\n"' $((port+2))"#,
            ),
            same(
                "published UDP ports are reached on IPv6",
                r#"
perl -MIO::Socket::IP -e 'for (1..60) { my $s = IO::Socket::IP->new(Proto => "udp", PeerHost => "::1", PeerPort => $ARGV[0]); send $s, "datagram\n", 0; my $r = ""; vec($r, fileno($s), 1) = 1; if (select($r, undef, undef, 1)) { if (defined recv $s, my $d, 99, 0) { print $d; exit } } } print "nothing\n"' $((port+2))"#,
            ),
            same("large downloads arrive whole", "curl -s http://127.0.0.1:$port/f | md5sum"),
            same(
                "docker stats counts what went over the network",
                "docker stats --no-stream --format '{{.NetIO}}' $name | awk '{print ($3 ~ /MB/ && $3+0 > 4)}'",
            ),
            same(
                "containers reach each other on the default bridge",
                r#"
address=$(field $name '{{.NetworkSettings.IPAddress}}'); run --rm --link $name:other busybox sh -c "wget -q -T 60 -O - http://$address/f | md5sum; ping -c 2 -W 20 other | grep -c '2 packets received'; env | grep -c OTHER_NAME""#,
            ),
            differs(
                "the network of another container is shared with --network container",
                "run --rm --name $name-b --network container:$name busybox true",
                "put both on one network",
                "refused: the other container's network stack is in its guest. Put both on one network of the user's, where they find each other by name",
            ),
            differs(
                "the host's network is the container's with --network host",
                "run --rm --name $name-h --network host busybox ls /sys/class/net | grep docker0",
                "publish ports",
                "refused: a virtual machine cannot share the host's network stack. Publish ports instead",
            ),
        ],
    },
    Group {
        name: "names",
        place: Place::Host,
        before: r#"
docker network create --ipv6 --subnet fd00:77:$((port % 10000))::/64 --subnet 10.77.$((port / 10 % 200)).0/24 --opt com.docker.network.driver.mtu=9000 $name >/dev/null
run -d --network $name --ip 10.77.$((port / 10 % 200)).99 --network-alias www --name $name busybox sh -c 'mkdir /www; echo named > /www/index.html; httpd -f -p 80 -h /www' >/dev/null
# Newer commands of Docker's have no --mac-address for daemons older than they are.
mac=02:11:22:33:${port:1:2}:${port:3:2}
curl -s --unix-socket /var/run/docker.sock -H 'Content-Type: application/json' -X POST "http://docker/containers/create?name=$name-client" -d "{\"Image\": \"busybox\", \"Cmd\": [\"sleep\", \"1000\"], \"MacAddress\": \"$mac\", \"HostConfig\": {\"Runtime\": \"$runtime\"}}" >/dev/null
docker start $name-client >/dev/null"#,
        after: "docker rm -f $name $name-client >/dev/null; docker network rm $name >/dev/null",
        cases: &[
            same(
                "--mac-address and --ip are the interface's",
                "docker exec $name-client cat /sys/class/net/eth0/address | grep -cx $mac; docker exec $name ip -4 -o addr | grep -c '\\.99/24'",
            ),
            same(
                "a network's MTU, addresses and routes",
                "docker exec $name sh -c 'cat /sys/class/net/eth0/mtu; ip -4 -o addr show eth0 | wc -l; ip -6 -o addr show dev eth0 scope global | wc -l; ip route | grep -c default; ip -6 route | grep -c default'",
            ),
            same(
                "a network is connected while it runs",
                "docker exec $name-client ls /sys/class/net; docker network connect $name $name-client; docker exec $name-client sh -c 'for i in $(seq 100); do ip route | grep -q eth1 && break; sleep 0.2; done; ls /sys/class/net; ip -4 -o addr show eth1 | wc -l; cat /sys/class/net/eth1/mtu'",
            ),
            same(
                "names are resolved on a network of the user's",
                "docker exec $name grep -v '^#' /etc/resolv.conf; docker exec $name sh -c \"nslookup $name-client | grep -c fd00; nslookup nosuch.invalid >/dev/null; echo \\$?\"; docker exec $name-client sh -c \"for n in $name www; do ping -c 1 -W 20 \\$n | grep -c '1 packets received'; done\"",
            ),
            same(
                "a name server of the container's own may listen at port 53",
                "docker exec $name sh -c 'nc -l -p 53 >/dev/null & sleep 1; kill $! && echo listened'",
            ),
            same(
                "IPv6 reaches another container",
                "address=$(field $name '{{range .NetworkSettings.Networks}}{{.GlobalIPv6Address}}{{end}}'); docker exec $name-client ping -6 -c 1 -W 20 $address | grep -c '1 packets received'",
            ),
            same(
                "networks are disconnected while it runs, and connected again",
                r#"
docker network disconnect $name $name-client; docker network disconnect bridge $name-client; docker exec $name-client sh -c 'for i in $(seq 100); do [ -e /sys/class/net/eth0 ] || [ -e /sys/class/net/eth1 ] || break; sleep 0.2; done; ls /sys/class/net'
docker network connect bridge $name-client; docker exec $name-client sh -c 'for i in $(seq 100); do ip route | grep -q default && break; sleep 0.2; done; ls /sys/class/net; ping -c 1 -W 20 172.17.0.1 | grep -c "1 packets received"'"#,
            ),
            same(
                "several networks are there from the start",
                "docker stop -t 0 $name-client >/dev/null; docker network connect $name $name-client; docker start $name-client >/dev/null; docker exec $name-client sh -c \"ls /sys/class/net; cat /sys/class/net/eth*/mtu; ip route | grep -c ^default; ip -4 -o addr | wc -l\"",
            ),
        ],
    },
];
