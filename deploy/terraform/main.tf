# An EKS cluster that runs deploy/kubernetes: terraform init && terraform apply, then
# terraform output -raw storage_class | kubectl apply -f - && kubectl apply -f ../kubernetes
terraform {
  required_version = ">= 1.3"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.40, < 7.0"
    }
  }
}

variable "region" {
  type    = string
  default = "eu-central-1"
}

variable "name" {
  type    = string
  default = "mmembed"
}

variable "kubernetes" {
  type        = string
  default     = "1.33"
  description = "Version of the cluster"
}

variable "instance_types" {
  type        = list(string)
  default     = ["c7i.2xlarge"]
  description = "c7i has avx512_bf16; use g6.xlarge, ami_type AL2023_x86_64_NVIDIA and a CUDA image for --device cuda"
}

variable "ami_type" {
  type    = string
  default = "AL2023_x86_64_STANDARD"
}

variable "nodes" {
  type    = object({ least = number, most = number })
  default = { least = 2, most = 10 }
  validation {
    condition     = var.nodes.least >= 1 && var.nodes.most >= var.nodes.least
    error_message = "nodes: at least one, and most not below least."
  }
}

provider "aws" {
  region = var.region
  default_tags { tags = { app = var.name } }
}

data "aws_availability_zones" "open" {
  state = "available"
}

locals {
  zones = slice(data.aws_availability_zones.open.names, 0, 2)
}

resource "aws_vpc" "this" {
  cidr_block           = "10.0.0.0/16"
  enable_dns_hostnames = true
  tags                 = { Name = var.name }
}

resource "aws_internet_gateway" "this" {
  vpc_id = aws_vpc.this.id
}

resource "aws_subnet" "public" {
  for_each                = { for i, zone in local.zones : zone => cidrsubnet(aws_vpc.this.cidr_block, 4, i) }
  vpc_id                  = aws_vpc.this.id
  availability_zone       = each.key
  cidr_block              = each.value
  map_public_ip_on_launch = true
  tags                    = { "kubernetes.io/role/elb" = "1" }
}

resource "aws_route_table" "public" {
  vpc_id = aws_vpc.this.id
  route {
    cidr_block = "0.0.0.0/0"
    gateway_id = aws_internet_gateway.this.id
  }
}

resource "aws_route_table_association" "public" {
  for_each       = aws_subnet.public
  subnet_id      = each.value.id
  route_table_id = aws_route_table.public.id
}

data "aws_iam_policy_document" "assume" {
  for_each = toset(["eks", "ec2"])
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["${each.key}.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "cluster" {
  name               = "${var.name}-cluster"
  assume_role_policy = data.aws_iam_policy_document.assume["eks"].json
}

resource "aws_iam_role" "node" {
  name               = "${var.name}-node"
  assume_role_policy = data.aws_iam_policy_document.assume["ec2"].json
}

resource "aws_iam_role_policy_attachment" "cluster" {
  role       = aws_iam_role.cluster.name
  policy_arn = "arn:aws:iam::aws:policy/AmazonEKSClusterPolicy"
}

resource "aws_iam_role_policy_attachment" "node" {
  for_each   = toset(["AmazonEKSWorkerNodePolicy", "AmazonEKS_CNI_Policy", "AmazonEC2ContainerRegistryReadOnly"])
  role       = aws_iam_role.node.name
  policy_arn = "arn:aws:iam::aws:policy/${each.key}"
}

resource "aws_ecr_repository" "this" {
  name         = var.name
  force_delete = true
}

resource "aws_eks_cluster" "this" {
  name     = var.name
  role_arn = aws_iam_role.cluster.arn
  version  = var.kubernetes
  vpc_config {
    subnet_ids             = [for s in aws_subnet.public : s.id]
    endpoint_public_access = true
  }
  access_config {
    authentication_mode                         = "API"
    bootstrap_cluster_creator_admin_permissions = true
  }
  depends_on = [aws_iam_role_policy_attachment.cluster]
}

resource "aws_eks_node_group" "serve" {
  cluster_name    = aws_eks_cluster.this.name
  node_group_name = "serve"
  node_role_arn   = aws_iam_role.node.arn
  subnet_ids      = [for s in aws_subnet.public : s.id]
  instance_types  = var.instance_types
  ami_type        = var.ami_type
  scaling_config {
    min_size     = var.nodes.least
    max_size     = var.nodes.most
    desired_size = var.nodes.least
  }
  lifecycle { ignore_changes = [scaling_config[0].desired_size] }
  depends_on = [aws_iam_role_policy_attachment.node]
}

# The artifact lies on EFS, which every node can read at once.
resource "aws_efs_file_system" "models" {
  encrypted = true
  tags      = { Name = "${var.name}-models" }
}

resource "aws_efs_mount_target" "models" {
  for_each        = aws_subnet.public
  file_system_id  = aws_efs_file_system.models.id
  subnet_id       = each.value.id
  security_groups = [aws_eks_cluster.this.vpc_config[0].cluster_security_group_id]
}

resource "aws_eks_addon" "volumes" {
  cluster_name = aws_eks_cluster.this.name
  addon_name   = "aws-efs-csi-driver"
  depends_on   = [aws_eks_node_group.serve]
}

resource "aws_iam_role_policy_attachment" "volumes" {
  role       = aws_iam_role.node.name
  policy_arn = "arn:aws:iam::aws:policy/service-role/AmazonEFSCSIDriverPolicy"
}

# terraform output -raw storage_class | kubectl apply -f -
output "storage_class" {
  value = <<-EOT
    apiVersion: storage.k8s.io/v1
    kind: StorageClass
    metadata:
      name: mmembed-models
    provisioner: efs.csi.aws.com
    parameters:
      provisioningMode: efs-ap
      fileSystemId: ${aws_efs_file_system.models.id}
      directoryPerms: "0755"
      uid: "1000"
      gid: "1000"
  EOT
}

output "configure_kubectl" {
  value = "aws eks update-kubeconfig --region ${var.region} --name ${aws_eks_cluster.this.name}"
}

output "push_the_image_to" {
  value = aws_ecr_repository.this.repository_url
}
